"""What a supervisor runs: commands, and when they are ready or hang."""

import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from esper.supervision.config import (
    DASHBOARD,
    ROUTER,
    BusConfig,
    DashboardConfig,
    JobConfig,
    RouterConfig,
    ServeConfig,
    ServiceConfig,
)
from esper.supervision.status import Kind
from esper.telemetry.run_folder import DATABASE_FILE, RUN_FILES, is_written
from esper.telemetry.run_reader import RunReader

_ESPER = (sys.executable, "-m", "esper")
_CHILDREN = (sys.executable, "-m", "esper.supervision.children")
_OWN_READY_SECONDS = 120.0
"""For what loads torch first, perhaps from a slow disk."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A port at which something answers that is ready."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run of a job.

    Attributes:
        folder: That it writes.
        resume: Goes on with it.
        resume_stopped: Whether also if somebody has stopped it by a command.
    """

    folder: Path
    resume: tuple[str, ...]
    resume_stopped: bool


@dataclass(frozen=True, kw_only=True)
class Program:
    """One thing to run; it is another one where anything in here is another.

    Attributes:
        name: Of all that are served only this one has it.
        kind: Decides when it starts and ends.
        command: Program and arguments; of a job that begins.
        folder: To run in.
        ready_place: Answers when it is ready; None is at the first heartbeat if there are any.
        ready_seconds: How long it may take to become ready.
        silent_seconds: After so long without a heartbeat it hangs; None has none.
        run: Of a job, None of anything else.
    """

    name: str
    kind: Kind
    command: tuple[str, ...]
    folder: Path
    ready_place: Place | None = None
    ready_seconds: float
    silent_seconds: float | None = None
    run: Run | None = None

    def differs_only_in_settings(self, other: "Program") -> bool:
        """Return whether another one is the same job, but for what a run of it begins with."""
        return (
            self.run is not None
            and self.command != other.command
            and replace(self, command=other.command) == other
        )


class RunState(StrEnum):
    """What is to be done with the run of a job."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    STOPPED = "stopped"
    BUSY = "busy"
    """Another process writes it."""


def state_of(run: Run) -> RunState:
    """Return what is to be done with a run.

    Raises:
        RunFolderError: The folder cannot be read.
    """
    if is_written(run.folder):
        return RunState.BUSY
    if _is_half_made(run.folder):
        return RunState.NEW
    status = RunReader(run.folder).status
    if status == "finished":
        return RunState.FINISHED
    if status == "stopped" and not run.resume_stopped:
        return RunState.STOPPED
    return RunState.UNFINISHED


def clear_half_made(folder: Path) -> bool:
    """Remove what a process that was killed had only begun to make of a run.

    Else nobody could begin it: a folder that holds some of its files is refused. Where there is
    anything else, nothing is removed.

    Returns:
        Whether there was something.

    Raises:
        OSError: It cannot be removed.
    """
    if not folder.is_dir() or is_written(folder) or not _is_half_made(folder):
        return False
    there = {path.name for path in folder.iterdir()}
    if not there or not there <= set(RUN_FILES):
        return False
    for name in there:
        (folder / name).unlink()
    return True


def _is_half_made(folder: Path) -> bool:
    """Return whether a folder has no database of a run, or one that nothing was written into."""
    file = folder / DATABASE_FILE
    if not file.exists():
        return True
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        return False  # whoever reads it is told what is wrong
    return not tables


def programs(config: ServeConfig, base: Path) -> list[Program]:
    """Return what a config runs, in the order in which it starts.

    Args:
        config: What is to be served.
        base: Folder of its file, in which everything runs.
    """
    found = [_service(service, base) for service in config.service]
    if config.router is not None and config.bus is not None:
        found.append(_router(config.router, config.bus, base))
    if config.dashboard is not None:
        found.append(_dashboard(config.dashboard, config.bus, base))
    return [*found, *(_job(job, config.bus, base) for job in config.job)]


def _service(service: ServiceConfig, base: Path) -> Program:
    ready = service.ready
    return Program(
        name=service.name,
        kind="service",
        command=service.command,
        folder=base,
        ready_place=None if ready is None else Place(host=ready.host, port=ready.port),
        ready_seconds=service.ready_seconds,
        silent_seconds=service.silent_seconds,
    )


def _router(router: RouterConfig, bus: BusConfig, base: Path) -> Program:
    command = [*_CHILDREN, ROUTER, "--bus", bus.telemetry_url, "--folder", str(router.folder)]
    return Program(
        name=ROUTER,
        kind="router",
        command=(*command, *_key_file("--key-file", bus)),
        folder=base,
        ready_seconds=_OWN_READY_SECONDS,
        silent_seconds=router.silent_seconds,
    )


def _dashboard(dashboard: DashboardConfig, bus: BusConfig | None, base: Path) -> Program:
    command = [*_CHILDREN, DASHBOARD, "--folder", str(dashboard.folder)]
    command += ["--host", dashboard.host, "--port", str(dashboard.port)]
    if dashboard.token_file is not None:
        command += ["--token-file", str(dashboard.token_file)]
    if dashboard.commands and bus is not None:
        command += ["--bus", bus.commands, *_key_file("--key-file", bus)]
    return Program(
        name=DASHBOARD,
        kind="dashboard",
        command=tuple(command),
        folder=base,
        ready_seconds=_OWN_READY_SECONDS,
        silent_seconds=dashboard.silent_seconds,
    )


def _key_file(option: str, bus: BusConfig) -> tuple[str, ...]:
    return () if bus.key_file is None else (option, str(bus.key_file))


def _job(job: JobConfig, bus: BusConfig | None, base: Path) -> Program:
    return Program(
        name=job.name,
        kind="job",
        command=(*_ESPER, "grow", *job_arguments(job, bus), "--out", str(job.folder), "--quiet"),
        folder=base,
        ready_seconds=job.silent_seconds,
        silent_seconds=job.silent_seconds,
        run=Run(
            folder=job.folder,
            resume=(*_ESPER, "resume", str(job.folder), "--quiet"),
            resume_stopped=job.resume_stopped,
        ),
    )


def job_arguments(job: JobConfig, bus: BusConfig | None) -> list[str]:
    """Return what `esper grow` is told of a job, its folder apart."""
    arguments = [job.task]
    if job.config is not None:
        arguments += ["--config", str(job.config)]
    for setting in job.settings:
        arguments += ["--set", setting]
    if bus is not None:
        arguments += ["--set", f"bus.commands={bus.commands}"]
        if bus.telemetry is not None:
            arguments += ["--set", f"bus.telemetry={bus.telemetry}"]
        if bus.key_file is not None:
            arguments += ["--set", f"bus.key_file={bus.key_file}"]
    return arguments
