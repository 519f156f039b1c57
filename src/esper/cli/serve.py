"""`esper serve`: run everything that one file names, and keep it running."""

import io
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.text import Text

from esper.supervision.config import DASHBOARD, ServeConfig, ServeConfigError, load_serve_config
from esper.supervision.finding import Finding
from esper.supervision.notice import SERVE, Notice

_NOT_READY = 1
_PACKAGES = {"anyio": "serve", "redis": "redis", "hiredis": "redis"}
_FINDING_STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}
_STATE_STYLES = {
    "ready": "green",
    "finished": "green",
    "given up": "red",
    "backing off": "yellow",
}


def serve(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file of jobs and services.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether all of it could be started.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Start what CONFIG names, in its order, and bring back what dies, until Ctrl-C or SIGTERM.

    SIGHUP reads the file again. Jobs that were begun before go on from their newest checkpoint.
    """
    if os.name != "posix":
        raise typer.BadParameter("esper serve needs process groups, which Windows has not")
    try:
        import anyio  # noqa: PLC0415 – an optional extra

        from esper.supervision.folder_lock import (  # noqa: PLC0415
            AlreadyServedError,
            FolderLock,
            is_served,
        )
        from esper.supervision.notice_printer import NoticePrinter  # noqa: PLC0415
        from esper.supervision.preflight import preflight  # noqa: PLC0415
        from esper.supervision.supervisor import (  # noqa: PLC0415
            Supervisor,
            end_left_behind,
            serve_until_signal,
        )
    except ModuleNotFoundError as error:
        extra = _PACKAGES.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise typer.BadParameter(
            f"esper serve needs {error.name}: pip install 'esper-lite[{extra}]'"
        ) from error
    # Until it can be obeyed: a file that is read again before it was read once changes nothing.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    found = _loaded(config)
    names = [DASHBOARD, *(part.name for part in found.service), *(part.name for part in found.job)]
    view = _View(max(map(len, names)), as_json=as_json)
    base = config.absolute().parent
    if check:
        findings = preflight(found, base, already_served=is_served(found.folder))
        view.findings(findings)
        raise typer.Exit(_NOT_READY if _failures(findings) else 0)
    try:
        lock = FolderLock(found.folder)
    except AlreadyServedError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        raise typer.BadParameter(f"{found.folder} cannot be written: {error}") from error
    left = end_left_behind(found.folder, found.stop.drain_seconds)
    if left:
        view.notice(Notice(about=SERVE, text=f"ended {left} processes of an esper serve before"))
    findings = preflight(found, base)
    view.findings(findings)
    if _failures(findings):
        raise typer.Exit(_NOT_READY)
    printer = NoticePrinter(view.notice)
    supervisor = Supervisor(config, found, preflight=findings, tell=printer.tell)
    anyio.run(serve_until_signal, supervisor)
    printer.close()
    lock.release()


def _loaded(config: Path) -> ServeConfig:
    try:
        return load_serve_config(config)
    except ServeConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _failures(findings: list[Finding]) -> bool:
    return any(finding.level == "failure" for finding in findings)


class _View:
    """Prints what happens, in lines for a person or for a program.

    Args:
        name_columns: Width of the longest name.
        as_json: Whether it is for a program.
    """

    def __init__(self, name_columns: int, *, as_json: bool) -> None:
        self._name_columns = name_columns
        self._console = Console(file=_unbuffered_output())
        self._as_json = as_json

    def findings(self, findings: list[Finding]) -> None:
        """Print what was found before the start."""
        width = max(len(finding.about) for finding in findings)
        for finding in findings:
            if self._as_json:
                self._print_json(finding.model_dump_json())
                continue
            line = Text(f"{finding.level:<8}", _FINDING_STYLES[finding.level])
            line.append(f"{finding.about:<{width}}  ", style="bold")
            line.append(finding.text, style="not bold")
            self._console.print(line, highlight=False, soft_wrap=True)

    def notice(self, notice: Notice) -> None:
        """Print that something has changed; where that cannot be, all goes on."""
        # Nobody reads it any more, which rich would end the program for, a disk is full, or it is
        # no text: what is served does not depend on it, and status.json tells the same.
        with suppress(OSError, SystemExit, ValueError):
            self._print(notice)

    def _print(self, notice: Notice) -> None:
        if self._as_json:
            self._print_json(notice.model_dump_json())
            return
        clock = time.strftime("%H:%M:%S", time.localtime(notice.time_seconds))
        line = Text(f"{clock}  ", style="dim")
        line.append(f"{notice.about:<{self._name_columns}}  ", style="bold not dim")
        if notice.state is not None:
            line.append(notice.state, style=_STATE_STYLES.get(notice.state, "not dim"))
        if notice.text:
            line.append(f"{': ' if notice.state else ''}{notice.text}", style="not dim")
        self._console.print(line, highlight=False, soft_wrap=True)
        for printed in notice.lines:
            shown = Text(f"{'':{self._name_columns + 11}}| {printed}", style="dim")
            self._console.print(shown, highlight=False, soft_wrap=True)

    def _print_json(self, line: str) -> None:
        self._console.out(line, highlight=False)


def _unbuffered_output() -> TextIO | None:
    """Return what prints to standard output; None where that is closed.

    Without a buffer, whose lock Python waits for when it ends: the thread that prints may hold it
    for as long as nobody reads.
    """
    if sys.stdout is None:
        return None
    raw = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw,
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        write_through=True,
    )
