"""A program that runs now, under its warden."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.to_thread

from esper.supervision import warden
from esper.supervision.line_pipe import LinePipe
from esper.telemetry.heartbeat import HEARTBEAT_VARIABLE

LOG_BYTES = 10 << 20
FOLDER_VARIABLE = "ESPER_SERVE_FOLDER"
SERVICE_VARIABLE = "ESPER_SERVE_NAME"

_WARDEN_SECONDS = 10.0
"""How much longer than its program a warden may take to end."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a program has ended.

    Attributes:
        code: Its exit code, below 0 the signal that has ended it; None if it is not known.
        problem: Why it is not.
    """

    code: int | None
    problem: str | None = None

    def __str__(self) -> str:
        if self.code is None:
            return self.problem or "ended"
        if self.code >= 0:
            return f"exit code {self.code}"
        with suppress(ValueError):
            return f"signal {-self.code} ({signal.Signals(-self.code).name})"
        return f"signal {-self.code}"


def marks_of(folder: Path, name: str | None = None) -> list[str]:
    """Return what all processes of a supervisor's folder, or of one program, were started with."""
    marks = [f"{FOLDER_VARIABLE}={folder}"]
    return marks if name is None else [*marks, f"{SERVICE_VARIABLE}={name}"]


class Child:
    """A program that was started, and the pipes to it and to its warden.

    Args:
        name: Of the program.
        command: The program and its arguments.
        working: Folder to run in.
        folder: Of the supervisor.
        log: Takes what it prints.
        drain_seconds: How long it may take to end.
        environment: What it finds besides what esper adds.
        changed: Is called when `log_problem` is another one.

    Raises:
        OSError: There is no room for another process or pipe.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        working: Path,
        folder: Path,
        log: Path,
        drain_seconds: float,
        environment: Mapping[str, str] = os.environ,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.pid: int | None = None
        """Of the program, once it runs."""
        self.running = anyio.Event()
        """Set once it runs."""
        self.log_problem: str | None = None
        """Why what it prints is lost, if it is."""
        self._changed = changed
        self._name = name
        self._folder = folder
        self._drain_seconds = drain_seconds
        self._ending: Ending | None = None
        with _Pipes() as pipes:
            lifeline, self._lifeline = pipes.new()
            reports, report = pipes.new()
            beating, beats = pipes.new()
            options = ["--lifeline", str(lifeline), "--report", str(report), "--beats", str(beats)]
            options += ["--log", str(log), "--log-bytes", str(LOG_BYTES)]
            options += ["--drain-seconds", str(drain_seconds)]
            self._warden = subprocess.Popen(  # noqa: S603 – of the user's own file
                [sys.executable, "-I", "-S", warden.__file__, *options, "--", *command],
                stdin=subprocess.DEVNULL,
                cwd=working,
                env={
                    **environment,
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONFAULTHANDLER": "1",
                    HEARTBEAT_VARIABLE: str(beats),
                    FOLDER_VARIABLE: str(folder),
                    SERVICE_VARIABLE: name,
                },
                pass_fds=[lifeline, report, beats],
                start_new_session=True,
            )
            pipes.keep(self._lifeline, reports, beating)
        os.set_blocking(self._lifeline, False)
        self._reports = LinePipe(reports)
        self.beats = LinePipe(beating)
        """What it says of itself, a JSON value for each heartbeat."""

    def end(self) -> None:
        """Ask the program to end; it is killed if it does not in time."""
        self._order(warden.END)

    def kill(self) -> None:
        """Kill it, and all that it has started."""
        self._order(warden.KILL)

    def kill_hanging(self) -> None:
        """Kill it, after it has had a moment to print where it is."""
        self._order(warden.DUMP)

    async def ended(self) -> Ending:
        """Wait for its end, and see to it that nothing is left of it."""
        if self._ending is None:
            ending = Ending(code=None, problem="its warden was killed")
            while (facts := await self._reports.next()) is not None:
                for fact in facts:
                    assert isinstance(fact, dict), fact
                    ending = self._take(fact) or ending
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._clean_up)
            self._ending = ending
        return self._ending

    async def ended_by_order(self) -> Ending:
        """Ask it to end, and wait for that, whatever its warden does. Cannot be cancelled."""
        self.end()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(self._drain_seconds + _WARDEN_SECONDS):
                await self.ended()
            if self._ending is None:
                await anyio.to_thread.run_sync(self._kill_all)
                self._kill_group()
            await self.ended()
        assert self._ending is not None
        return self._ending

    def close(self) -> None:
        """Close the pipes to a program that has ended."""
        os.close(self._lifeline)
        self._reports.close()
        self.beats.close()

    def _take(self, fact: Mapping[str, Any]) -> Ending | None:
        """Take note of what the warden says."""
        if "started" in fact:
            self.pid = int(fact["started"])
            self.running.set()
        elif "log" in fact:
            self.log_problem = fact["log"]
            self._changed()
        elif "failed" in fact:
            return Ending(code=None, problem=str(fact["failed"]))
        elif "ended" in fact:
            return Ending(code=int(fact["ended"]))
        return None

    def _order(self, order: bytes) -> None:
        with suppress(BrokenPipeError):  # it has ended
            os.write(self._lifeline, order)

    def _kill_group(self) -> None:
        # The warden was not waited for yet, so no other process can have its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._warden.pid, signal.SIGKILL)

    def _clean_up(self) -> None:
        self._kill_group()
        self._warden.wait()
        self._kill_all()

    def _kill_all(self) -> None:
        warden.kill_marked(marks_of(self._folder, self._name))


class _Pipes:
    """Makes pipes; their ends are closed behind it, but for those that are kept."""

    def __init__(self) -> None:
        self._ends: set[int] = set()

    def new(self) -> tuple[int, int]:
        """Return a reading and a writing end."""
        ends = os.pipe()
        self._ends.update(ends)
        return ends

    def keep(self, *ends: int) -> None:
        """Leave some open."""
        self._ends.difference_update(ends)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            os.close(end)
