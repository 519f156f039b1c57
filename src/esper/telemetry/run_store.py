"""The run folder: config, environment, and every event and metric in SQLite."""

import json
import math
import os
import secrets
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

from esper.lifecycle.events import EventRecord, parse_event_record
from esper.telemetry.command_log import BUSY_SECONDS, CommandLog

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
DATABASE_FILE = "run.sqlite"
WEIGHTS_FILE = "weights.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = ".lock"
STORE_VERSION = 1

RUN_FILES = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, LOCK_FILE),
    *(f"{DATABASE_FILE}{ending}" for ending in ("", "-wal", "-shm", "-journal")),
)
"""What a run has in its folder from the start, or now and then."""

_READ_TIMEOUT_SECONDS = 0.5
_LOCK_WAITS = 5
_ID_BYTES = 4
_LOCK_WAIT_SECONDS = 0.02

_FORGET_EVENTS = "DELETE FROM events WHERE step > ?"
_FORGET_METRICS = "DELETE FROM metrics WHERE step > ?"

_EVENTS = "SELECT id, record FROM events WHERE id > ? ORDER BY id LIMIT ?"
_EVENTS_OF_TYPES = """
SELECT id, record FROM events WHERE id > ? AND type IN (SELECT value FROM json_each(?))
ORDER BY id LIMIT ?
"""
_METRICS = "SELECT id, epoch, step, name, value FROM metrics"
_FIRST_TIME = "SELECT time_seconds FROM events ORDER BY id LIMIT 1"
_LAST_EVENT = "SELECT time_seconds, epoch, step FROM events ORDER BY id DESC LIMIT 1"
_LAST_METRIC = "SELECT epoch, step FROM metrics ORDER BY id DESC LIMIT 1"

RunStatus = Literal["running", "finished", "failed", "interrupted", "stopped"]

_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    time_seconds REAL NOT NULL,
    epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    type TEXT NOT NULL,
    priority TEXT NOT NULL,
    slot TEXT,
    record TEXT NOT NULL
);
CREATE INDEX events_by_type ON events (type, id);
CREATE TABLE metrics (
    id INTEGER PRIMARY KEY,
    epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    name TEXT NOT NULL,
    value REAL
);
CREATE INDEX metrics_by_name ON metrics (name, id);
"""


class RunFolderError(ValueError):
    """A run folder that exists already, is missing, or is not one this version can read."""


class RunStore:
    """Writes a run folder; a sink for events and metrics. Readable while the run goes on.

    The database is in WAL mode, and each event is committed as it is taken: a process that is
    killed loses none. A machine that loses its power may lose the last ones, as nothing waits for
    the disk.

    Args:
        folder: Is created; must not hold a run yet.
        config: Everything that was chosen, as JSON values.
        environment: Versions, device and settings, as JSON values.

    Raises:
        RunFolderError: The folder holds a run.
        OSError: It cannot be written.
    """

    def __init__(
        self, folder: Path, *, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        for name in (DATABASE_FILE, CONFIG_FILE, ENVIRONMENT_FILE):
            if (folder / name).exists():
                raise RunFolderError(
                    f"{folder} holds a run already, there is a {name}; choose another folder or "
                    "remove this one"
                )
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / CONFIG_FILE, config)
        _write_json(folder / ENVIRONMENT_FILE, environment)
        self._open(folder)
        with self._let_go_on_error(), self._transaction():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._database.execute(statement)
            self._set("store_version", str(STORE_VERSION))
            self._set("attempt", "1")
            self._set("status", "running")
            self._set("id", f"{folder.absolute().name}-{secrets.token_hex(_ID_BYTES)}")

    @property
    def run_id(self) -> str:
        """The run's own: its folder's first name, and what no other run of that name has."""
        return RunReader(self.folder).run_id

    def _open(self, folder: Path, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self.folder = folder
        with ExitStack() as undoing:
            self._lock = _WriterLock(folder)
            undoing.callback(self._lock.release)
            self._database = sqlite3.connect(
                folder / DATABASE_FILE, isolation_level=None, timeout=busy_seconds
            )
            undoing.callback(self._database.close)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self.commands = CommandLog(
                self._database, busy_seconds=busy_seconds, store_event=self.publish
            )
            """Who asked what of the run, and what came of it; what is published while a command is
            settled is committed with its outcome."""
            undoing.pop_all()

    def publish(self, record: EventRecord) -> None:
        """Store one event."""
        event = record.event
        self._database.execute(
            "INSERT INTO events (time_seconds, epoch, step, type, priority, slot, record) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                record.time_seconds,
                record.epoch,
                record.step,
                event.type,
                event.priority.value,
                getattr(event, "slot", None),
                record.model_dump_json(),
            ),
        )

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Store named values, all or none; NaN is kept as NULL."""
        with self._transaction():
            self._database.executemany(
                "INSERT INTO metrics (epoch, step, name, value) VALUES (?, ?, ?, ?)",
                [(epoch, step, name, value) for name, value in metrics.items()],
            )

    def flush(self) -> None:
        """Nothing is kept back."""

    def set_status(self, status: RunStatus) -> None:
        """Say how the run stands."""
        self._set("status", status)

    def close(self) -> None:
        """Let go of the database, as one plain file unless somebody reads it right now."""
        try:
            with suppress(sqlite3.OperationalError):
                self._database.execute("PRAGMA journal_mode=DELETE")
        finally:
            self._let_go()

    def _let_go(self) -> None:
        try:
            self._database.close()
        finally:
            self._lock.release()

    @contextmanager
    def _let_go_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._let_go()
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._database.in_transaction:  # a command is being settled
            yield
            return
        with self._database:
            self._database.execute("BEGIN")
            yield

    def _set(self, key: str, value: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))


class ReopenedRunStore(RunStore):
    """Goes on writing the folder of a run that was stopped.

    Args:
        folder: Of a run.
        after_step: The last step that the run still knows of; what was written of later ones is
            forgotten. Below 0 that is everything.

    Raises:
        RunFolderError: It is no run folder, of another version, or a process writes it.
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        attempt = RunReader(folder).attempt
        self._open(folder)
        with self._let_go_on_error(), self._transaction():
            for forget in (_FORGET_EVENTS, _FORGET_METRICS):
                self._database.execute(forget, (after_step,))
            self._set("attempt", str(attempt + 1))
            self._set("status", "running")


class _WriterLock:
    """Held by the one process that writes a run folder; ends with it, however it ends.

    Raises:
        RunFolderError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        waits = 0
        while not _lock(self._descriptor):
            if waits == _LOCK_WAITS:
                os.close(self._descriptor)
                raise RunFolderError(
                    f"{folder} is being written by another process; wait for it, or stop it"
                )
            waits += 1
            time.sleep(_LOCK_WAIT_SECONDS)  # who only looks whether a run is written holds it too

    def release(self) -> None:
        """Let others write."""
        os.close(self._descriptor)


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed, and return whether that is possible.

    Args:
        descriptor: Of the file.
        shared: Others may hold a shared lock too; it is held only to see whether nobody writes.
    """
    try:
        import fcntl  # noqa: PLC0415 – not on Windows
    except ModuleNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_written(folder: Path) -> bool:
    """Return whether a process writes a run folder now, also one that it has only begun to make.

    Not known on Windows, where it is False.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def standing(status: str, *, has_writer: bool) -> str:
    """Return how a run stands for those who look at it: its status, or "killed".

    Args:
        status: That it has written.
        has_writer: Whether a process wrote its folder, asked before the status was read: a run that
            ends says so first. Not known on Windows, where no run counts as killed.
    """
    killed = status == "running" and not has_writer and os.name == "posix"
    return "killed" if killed else status


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """One stored event."""

    id: int
    record: EventRecord


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One stored value."""

    id: int
    epoch: int
    step: int
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class RunGlance:
    """What a list of runs shows of one, read at one moment without reading its events.

    Times are None, and epoch and step 0, of a run without events.
    """

    status: str
    attempt: int
    event_counts: Mapping[str, int]
    """By type."""
    first_seconds: float | None
    """Since the Unix epoch, of the first event."""
    last_seconds: float | None
    epoch: int
    """Of the last event or value."""
    step: int


class RunReader:
    """Reads a run folder, also of a run that is still going on.

    Raises:
        RunFolderError: It is no run folder, or was written by another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / DATABASE_FILE).is_file():
            raise RunFolderError(
                f"{folder} is no run folder: it has no {DATABASE_FILE}; esper grow prints the path "
                "of the folder it writes"
            )
        version = self._value("store_version")
        if version != str(STORE_VERSION):
            raise RunFolderError(
                f"{folder} was written with store version {version}; this esper reads version "
                f"{STORE_VERSION}"
            )

    @property
    def status(self) -> str:
        """How the run stands; a killed run stays "running"."""
        return self._value("status") or "unknown"

    @property
    def standing(self) -> str:
        """The status, but "killed" where the run says that it is running and nobody writes it."""
        has_writer = self.is_written
        return standing(self.status, has_writer=has_writer)

    @property
    def attempt(self) -> int:
        """How often the run was started, resuming included; rows that were read may be gone then.

        Rows are only ever added as long as this stays the same.
        """
        return int(self._value("attempt") or 1)

    @property
    def run_id(self) -> str:
        """What the run is called where there are others, as on a bus."""
        return self._value("id") or self.folder.absolute().name

    @property
    def is_written(self) -> bool:
        """Whether a process writes the folder now; a "running" run without one was killed.

        Not known on Windows, where it is False.
        """
        return is_written(self.folder)

    def glance(self) -> RunGlance:
        """Return how the run stands."""
        with self._connection() as database:
            database.execute("BEGIN")  # all of it from one state
            kept = dict(database.execute("SELECT key, value FROM run"))
            counts = dict(database.execute("SELECT type, count(*) FROM events GROUP BY type"))
            first = database.execute(_FIRST_TIME).fetchone()
            last = database.execute(_LAST_EVENT).fetchone()
            measured = database.execute(_LAST_METRIC).fetchone()
        last_seconds, *event_place = last or (None, 0, 0)
        epoch, step = max(tuple(event_place), measured or (0, 0))
        return RunGlance(
            status=kept.get("status", "unknown"),
            attempt=int(kept.get("attempt", 1)),
            event_counts=counts,
            first_seconds=first and first[0],
            last_seconds=last_seconds,
            epoch=epoch,
            step=step,
        )

    def config(self) -> dict[str, Any]:
        """Return what was chosen for the run."""
        return _read_json(self.folder / CONFIG_FILE)

    def environment(self) -> dict[str, Any]:
        """Return versions, device and settings of the run."""
        return _read_json(self.folder / ENVIRONMENT_FILE)

    def events(self) -> list[EventRecord]:
        """Return every event, oldest first.

        Raises:
            EventSchemaError: An event was written by another version.
        """
        return [row.record for row in self.event_rows()]

    def event_rows(
        self, *, after: int = 0, limit: int = -1, types: Collection[str] = ()
    ) -> list[EventRow]:
        """Return events with their rows, oldest first.

        Args:
            after: The id of a row that was read before; 0 begins with the first.
            limit: At most so many; below 0 is all.
            types: Only events of these types; none returns all.

        Raises:
            EventSchemaError: An event was written by another version.
        """
        with self._connection() as database:
            if types:
                chosen = json.dumps([*types])
                rows = database.execute(_EVENTS_OF_TYPES, (after, chosen, limit)).fetchall()
            else:
                rows = database.execute(_EVENTS, (after, limit)).fetchall()
        return [EventRow(id=id_, record=parse_event_record(record)) for id_, record in rows]

    def metrics(
        self, *, after: int = 0, name: str | None = None, limit: int = -1
    ) -> list[MetricRow]:
        """Return values, oldest first; NULL reads as NaN.

        Args:
            after: The id of a row that was read before; 0 begins with the first.
            name: Only values of this name; None returns all.
            limit: At most so many; below 0 is all.
        """
        chosen, which = ("", ()) if name is None else ("name = ? AND ", (name,))
        query = f"{_METRICS} WHERE {chosen}id > ? ORDER BY id LIMIT ?"
        with self._connection() as database:
            rows = database.execute(query, (*which, after, limit)).fetchall()
        return [
            MetricRow(
                id=id_,
                epoch=epoch,
                step=step,
                name=name,
                value=math.nan if value is None else value,
            )
            for id_, epoch, step, name, value in rows
        ]

    def last_metric_id(self) -> int:
        """Return the id of the newest value's row; 0 if there is none."""
        with self._connection() as database:
            (newest,) = database.execute("SELECT coalesce(max(id), 0) FROM metrics").fetchone()
        return int(newest)

    def _value(self, key: str) -> str | None:
        with self._connection() as database:
            row = database.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        file = self.folder / DATABASE_FILE
        address = f"{file.absolute().as_uri()}?mode=ro"
        if not (os.access(self.folder, os.W_OK) or file.with_name(f"{file.name}-wal").exists()):
            address += "&immutable=1"  # nobody can be writing it, and SQLite can make no files here
        try:
            with closing(
                sqlite3.connect(address, uri=True, timeout=_READ_TIMEOUT_SECONDS)
            ) as database:
                yield database
        except sqlite3.OperationalError as error:
            raise RunFolderError(f"{file} cannot be read now: {error}") from error
        except sqlite3.DatabaseError as error:
            raise RunFolderError(f"{file} is damaged: {error}") from error


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        to_json(document)  # what cannot be sent on, as half a surrogate pair, is no JSON either
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise RunFolderError(f"{path} does not hold a JSON object")
    return document
