"""How everything that is served stands, in one file."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from esper.lifecycle.record import Record
from esper.supervision.finding import Finding

STATUS_FILE = "status.json"

Kind = Literal["service", "router", "dashboard", "job"]


class ServiceState(StrEnum):
    """How one program stands."""

    WAITING = "waiting"
    """For what it needs."""
    STARTING = "starting"
    """It runs, and cannot be used yet."""
    READY = "ready"
    """It runs; a job trains."""
    BACKING_OFF = "backing off"
    """It has died, and is started again after a while."""
    GIVEN_UP = "given up"
    """It has died too often in a row."""
    STOPPING = "stopping"
    """It was asked to end."""
    FINISHED = "finished"
    """A job whose run is complete."""
    STOPPED = "stopped"
    """A job that somebody has stopped, or anything that ended with the supervisor."""


class BeatStatus(Record):
    """The last sign of life of a program."""

    age_seconds: float
    state: str
    step: int | None = None
    details: dict[str, JsonValue] = Field(default_factory=dict)


class ServiceStatus(Record):
    """How one program stands."""

    name: str
    kind: Kind
    state: ServiceState
    reason: str | None = None
    """Why it waits, was started again or is given up; that what it prints is lost, while it is."""
    pid: int | None = None
    since_seconds: float
    """When it came into this state, since the Unix epoch."""
    restarts: int = 0
    """Since the supervisor began."""
    beat: BeatStatus | None = None
    """None of one that gives no signs of life, or does not run."""
    silent_seconds: float | None = None
    """After so long without a sign of life it hangs."""
    last_exit: str | None = None
    """How it ended last."""
    last_lines: tuple[str, ...] = ()
    """What it printed before it ended last, unless that was as it should be."""
    next_start_seconds: float | None = None
    """Since the Unix epoch."""
    log: str


class ReloadStatus(Record):
    """What came of the last request to read the file again."""

    time_seconds: float
    done: bool
    text: str


class ServeStatus(Record):
    """How everything stands; `status.json` in the folder of the supervisor."""

    version: Literal[1] = 1
    time_seconds: float
    pid: int
    host: str
    config: str
    """The file."""
    ending: bool
    """Whether the supervisor was asked to end."""
    services: tuple[ServiceStatus, ...]
    preflight: tuple[Finding, ...]
    reload: ReloadStatus | None = None
    bus: str | None = None
    """How telling it over the bus goes; None without one."""


class StatusError(ValueError):
    """There is no status that can be read; the message says why."""


def write_status(status: ServeStatus, folder: Path) -> None:
    """Put a status in the place of the last one, whole.

    Raises:
        OSError: It cannot be written.
    """
    new = folder / f".{STATUS_FILE}.new"
    # Readable by its owner alone: a program's last lines may hold a token.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(status.model_dump_json(indent=1))
    new.replace(folder / STATUS_FILE)


def read_status(folder: Path) -> ServeStatus:
    """Return the last status that was written in a folder.

    Raises:
        StatusError: There is none, or it is damaged or of another version.
    """
    file = folder / STATUS_FILE
    try:
        return ServeStatus.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise StatusError(f"nobody has served in {folder}: it has no {STATUS_FILE}") from error
    except (OSError, ValidationError) as error:
        raise StatusError(f"{file} cannot be read: {error}") from error


def needs_a_person(service: ServiceStatus, *, now_seconds: float) -> bool:
    """Return whether a program is given up or silent.

    Args:
        service: How it stands.
        now_seconds: When it stood so, since the Unix epoch.
    """
    if service.state == ServiceState.GIVEN_UP:
        return True
    if service.state != ServiceState.READY or service.beat is None:
        return False
    limit = service.silent_seconds
    silent = min(service.beat.age_seconds, now_seconds - service.since_seconds)
    return limit is not None and silent > limit
