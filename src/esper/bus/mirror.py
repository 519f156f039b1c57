"""What a run elsewhere tells, as a run folder here."""

import json
import math
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from esper.bus.bus import EMERGENCY, TELEMETRY, Stream
from esper.bus.envelope import Envelope, MessageRefusedError, Refusal
from esper.bus.messages import (
    BundleMessage,
    EventMessage,
    Message,
    MetricsMessage,
    RunMessage,
    StatusMessage,
)
from esper.bus.sequences import SequenceTracker
from esper.bus.telemetry_lane import WENT_BACK
from esper.lifecycle.events import Priority
from esper.lifecycle.record import Record
from esper.telemetry.run_folder import CONFIG_FILE, DATABASE_FILE, ENVIRONMENT_FILE, RunFolderError
from esper.telemetry.run_reader import MIRROR_KEY
from esper.telemetry.run_store import RunStore

Telling = RunMessage | EventMessage | MetricsMessage | BundleMessage | StatusMessage
"""What a run tells of itself."""

_BUSY_SECONDS = 0.05
"""For which a mirror that somebody else holds is waited for: all other runs wait meanwhile."""
_MAX_INTEGER = (1 << 63) - 1
_FORGET_EVENTS = {
    EMERGENCY.name: "DELETE FROM events WHERE step > ? AND priority != ? AND type != ?",
    TELEMETRY.name: "DELETE FROM events WHERE step > ? AND (priority = ? OR type = ?)",
}
"""Which events come by which stream is what `is_emergency` says."""
_FORGET_METRICS = "DELETE FROM metrics WHERE step > ?"
_HAS_RUN_TABLE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'run'"


class _State(Record):
    """What a mirror knows besides what it shows."""

    missed: int = 0
    sequences: dict[str, dict[str, Any]] = Field(default_factory=dict)
    attempts: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """The producer of each that a stream has told of, the first attempt first."""
    after_steps: dict[int, int] = Field(default_factory=dict)
    """Of each attempt, counted from 0, that has told it."""
    revision: int = 1
    """Rises whenever rows may be gone."""
    told_of: bool = False
    """Whether config and environment are known."""


class NoMirrorError(RunFolderError):
    """A folder that is there already, and that no router has made."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """A message of a run, verified.

    Attributes:
        stream: That it came by.
    """

    stream: Stream
    envelope: Envelope
    message: Telling


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What came of messages.

    Attributes:
        stored: That were new.
        again: That were known already.
        missed: How many more are missing now; below 0 where some came late.
    """

    stored: int
    again: int
    missed: int


class Mirror(RunStore):
    """Writes a run folder from what the bus brings, each message once, however often it comes.

    Whatever tells of runs reads it as that of a run which was trained here. Which messages have
    come is committed with what they say, so a process that is killed at any moment has stored a
    message wholly or not at all, and knows which.

    A run that is resumed tells of it first in each stream, by a `Sealer` of its own; then what came
    by that stream of later steps is forgotten. If that one message is missing, what the other
    stream has told of the same attempt holds. What an attempt tells once the next one has begun
    holds up to the step from which that has gone on.

    Args:
        folder: Of this run, whose id is its name; is made if it is not there.
        first: What is known of the run; may come later.

    Raises:
        NoMirrorError: The folder is there, and is no mirror.
        RunFolderError: Another process writes it.
        OSError: It cannot be written.
        sqlite3.Error: It cannot be written, or is damaged.
    """

    def __init__(self, folder: Path, first: RunMessage | None = None) -> None:
        if not (folder.exists() or folder.is_symlink()):
            _make(folder, first)
        if folder.is_symlink() or missed_in(folder) is None:
            raise NoMirrorError(f"{folder} is there already, and no mirror of a run elsewhere")
        self._open(folder, lock_seconds=_BUSY_SECONDS, busy_seconds=_BUSY_SECONDS)
        with self._let_go_on_error():
            self._identity = _identity(folder)
            self._state, self._sequences = self._loaded()

    def take(self, told: Iterable[Told]) -> Taken:
        """Store what is new of some messages, all or nothing.

        Raises:
            OSError: Nothing was stored.
            sqlite3.Error: Nothing was stored.
        """
        missing = self._sequences.missing
        stored = again = 0
        try:
            with self._transaction():
                for one in told:
                    if self._take(one):
                        stored += len(one.envelope.numbers)
                    else:
                        again += len(one.envelope.numbers)
                self._set(MIRROR_KEY, self._now().model_dump_json())
        except BaseException:
            self._state, self._sequences = self._loaded()
            raise
        return Taken(stored=stored, again=again, missed=self._sequences.missing - missing)

    @property
    def is_in_place(self) -> bool:
        """Whether the folder is still the one that was opened."""
        try:
            return _identity(self.folder) == self._identity
        except OSError:
            return False

    def _take(self, told: Told) -> bool:
        """Store a message, and return whether it is new."""
        envelope, message, stream = told.envelope, told.message, told.stream.name
        if not self._sequences.take(envelope.producer, envelope.numbers):
            return False
        attempts = self._state.attempts.get(stream, ())
        begins = envelope.producer not in attempts
        if begins:
            attempts = (*attempts, envelope.producer)
            self._change(attempts={**self._state.attempts, stream: attempts})
        number = attempts.index(envelope.producer)
        if isinstance(message, RunMessage):
            self._get_to_know(number, message)
        if begins:
            self._begin_attempt(stream, number)
        later = range(number + 1, len(attempts))
        after_steps = self._state.after_steps
        last_step = min((after_steps[one] for one in later if one in after_steps), default=math.inf)
        for one in message.messages if isinstance(message, BundleMessage) else (message,):
            if isinstance(one, EventMessage) and one.record.step <= last_step:
                self.publish(one.record)
            elif isinstance(one, MetricsMessage) and one.step <= last_step:
                self.measure(one.epoch, one.step, one.metrics)
            elif isinstance(one, StatusMessage) and not later:
                self.set_status(one.status)
        return True

    def _get_to_know(self, number: int, message: RunMessage) -> None:
        """Take what an attempt says of itself."""
        self._change(after_steps={**self._state.after_steps, number: message.after_step})
        if not self._state.told_of:
            _write(self.folder, message)
            self._change(told_of=True)

    def _begin_attempt(self, stream: str, number: int) -> None:
        """Forget what does not hold any more of what came by a stream."""
        if stream == TELEMETRY.name:
            self.set_status("running")
        after_step = self._state.after_steps.get(number)
        if after_step is None:
            return
        forgotten = self._database.execute(
            _FORGET_EVENTS[stream], (after_step, Priority.NORMAL.value, WENT_BACK)
        ).rowcount
        if stream == TELEMETRY.name:
            forgotten += self._database.execute(_FORGET_METRICS, (after_step,)).rowcount
        if forgotten or number:
            self._change(revision=self._state.revision + 1)
            self._set("attempt", str(self._state.revision))

    def _change(self, **fields: Any) -> None:
        self._state = self._state.model_copy(update=fields)

    def _now(self) -> _State:
        sequences = self._sequences
        self._change(missed=sequences.missing, sequences=sequences.state_dict())
        return self._state

    def _loaded(self) -> tuple[_State, SequenceTracker]:
        state = _state_in(self._database, self.folder)
        assert state is not None
        return state, SequenceTracker.load(state.sequences)


def check_telling(envelope: Envelope, message: Message) -> Telling:
    """Return what a message says of a run, if a run folder can hold it.

    Raises:
        MessageRefusedError: It says something else, or has numbers that no database takes.
    """
    if isinstance(message, BundleMessage):
        for one in message.messages:
            check_telling(envelope, one)
        return message
    if isinstance(message, EventMessage):
        record = message.record
        if math.isnan(record.time_seconds):
            raise _refused(envelope, "has no time")
        numbers = (record.epoch, record.step)
    elif isinstance(message, MetricsMessage):
        numbers = (message.epoch, message.step)
    elif isinstance(message, RunMessage):
        numbers = (message.after_step, 0)
    elif isinstance(message, StatusMessage):
        numbers = (0, 0)
    else:
        raise _refused(envelope, f"is no telemetry: {message.kind}")
    if max(numbers) > _MAX_INTEGER or min(numbers) < -_MAX_INTEGER:
        raise _refused(envelope, f"has numbers beyond 63 bits: {numbers}")
    return message


def missed_in(folder: Path) -> int | None:
    """Return how many messages of a mirrored run have not come; None if the folder is no mirror.

    Raises:
        RunFolderError: It is a damaged mirror.
        sqlite3.Error: It cannot be read now, or is damaged.
    """
    file = folder / DATABASE_FILE
    if not file.is_file() or file.is_symlink():
        return None
    address = f"{file.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
        state = _state_in(database, folder)
    return None if state is None else state.missed


def _state_in(database: sqlite3.Connection, folder: Path) -> _State | None:
    if database.execute(_HAS_RUN_TABLE).fetchone() is None:
        return None  # an empty file, or a database of something else
    row = database.execute("SELECT value FROM run WHERE key = ?", (MIRROR_KEY,)).fetchone()
    try:
        return None if row is None else _State.model_validate_json(row[0])
    except ValidationError as error:
        raise RunFolderError(f"the mirror {folder} is damaged: {error}") from error


def _refused(envelope: Envelope, text: str) -> MessageRefusedError:
    return MessageRefusedError(Refusal.UNKNOWN_BODY, f"message {envelope.id} {text}")


def _make(folder: Path, first: RunMessage | None) -> None:
    """Make a mirror that has taken nothing; it is whole before it has the folder's name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = _making(folder)
    if making.exists():
        shutil.rmtree(making)  # of a process that was killed
    config, environment = (first.config, first.environment) if first is not None else ({}, {})
    RunStore(making, config=config, environment=environment).close()
    state = _State(told_of=first is not None)
    with closing(sqlite3.connect(making / DATABASE_FILE)) as database, database:
        # The run's own id, by which it is commanded, and not one of the folder it is made in.
        database.executemany(
            "INSERT OR REPLACE INTO run VALUES (?, ?)",
            [(MIRROR_KEY, state.model_dump_json()), ("id", folder.name)],
        )
    making.rename(folder)


def _making(folder: Path) -> Path:
    """Return where a mirror is made; no name of a run is so, nor longer than a name may be."""
    return folder.with_name(f".mirror-{sha256(folder.name.encode()).hexdigest()[:16]}")


def _write(folder: Path, message: RunMessage) -> None:
    for name, document in ((CONFIG_FILE, message.config), (ENVIRONMENT_FILE, message.environment)):
        temporary = folder / f".{name}"
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def _identity(folder: Path) -> tuple[int, int]:
    status = (folder / DATABASE_FILE).lstat()
    return status.st_dev, status.st_ino
