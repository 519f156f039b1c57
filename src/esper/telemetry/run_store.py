"""Writing a run folder: config, environment, and every event and metric in SQLite."""

import secrets
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from esper.lifecycle.events import EventRecord, RunStarted
from esper.telemetry.command_log import BUSY_SECONDS, CommandLog
from esper.telemetry.run_folder import (
    CONFIG_FILE,
    DATABASE_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    LOCK_SECONDS,
    RUN_FILES,
    STORE_VERSION,
    RunFolderError,
    RunStatus,
    WriterLock,
    status_after,
    write_json,
)
from esper.telemetry.run_reader import RunReader
from esper.telemetry.sink import as_floats

_ID_BYTES = 4
_ID_NAME_BYTES = 255 - 1 - 2 * _ID_BYTES
"""With the rest of the id it can be the name of a folder."""

_FORGET_EVENTS = "DELETE FROM events WHERE (step, epoch) > (?, ?)"
_FORGET_METRICS = "DELETE FROM metrics WHERE (step, epoch) > (?, ?)"
_HAS_BEGUN = "SELECT EXISTS (SELECT * FROM events WHERE type = 'run_started')"

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


class RunStore:
    """Writes a run folder; a sink for events and metrics. Readable while the run goes on.

    As a context manager it notes how the run has ended: finished, interrupted by Ctrl-C, or failed.
    One that is closed without a status counts as killed.

    The database is in WAL mode, and each event is committed as it is taken: a process that is
    killed loses none. A machine that loses its power may lose the last ones, as nothing waits for
    the disk.

    Args:
        folder: Is created; must not hold a run yet.
        config: Everything that was chosen, as JSON values.
        environment: Versions, device and settings, as JSON values.

    Raises:
        RunFolderError: The folder holds a run, or another process has begun to make one there.
        OSError: It cannot be written; no run is in the folder then.
        TypeError: A value of the config or the environment is none that JSON has.
    """

    def __init__(
        self, folder: str | Path, *, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        folder = Path(folder)
        _check_no_run(folder)  # before anything is made in it

        def begin(undoing: ExitStack) -> None:
            _check_no_run(folder)  # another process may have been quicker
            undoing.callback(_remove_run, folder)
            write_json(folder / CONFIG_FILE, config)
            write_json(folder / ENVIRONMENT_FILE, environment)

        folder.mkdir(parents=True, exist_ok=True)
        self._open(folder, begin)
        with self._let_go_on_error(), ExitStack() as undoing:
            undoing.callback(_remove_run, folder)
            with self._transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._database.execute(statement)
                self._set("store_version", str(STORE_VERSION))
                self._set("attempt", "1")
                self._set("status", "running")
                self._set("id", _new_id(folder.absolute().name))
            undoing.pop_all()

    @property
    def run_id(self) -> str:
        """The run's own: its folder's first name, and what no other run of that name has.

        Where a bus, or a folder elsewhere, would not take the name, what is left of it.
        """
        return RunReader(self.folder).run_id

    def _open(
        self,
        folder: Path,
        begin: Callable[[ExitStack], None] = lambda _: None,
        *,
        lock_seconds: float = LOCK_SECONDS,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        """Open the database.

        Args:
            folder: Of the run.
            begin: Is called once no other process can write the folder, with what is undone before
                another can if this fails.
            lock_seconds: To wait for a process that looks whether another writes the folder.
            busy_seconds: To wait for a process that reads the database.
        """
        self.folder = folder
        with ExitStack() as undoing:
            self._lock = WriterLock(folder, wait_seconds=lock_seconds)
            undoing.callback(self._lock.release)
            begin(undoing)
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
        """Store named values, all or none; NaN is kept as NULL.

        Raises:
            TypeError: One is no number.
        """
        values = as_floats(metrics)  # NumPy's would be stored as bytes
        with self._transaction():
            self._database.executemany(
                "INSERT INTO metrics (epoch, step, name, value) VALUES (?, ?, ?, ?)",
                [(epoch, step, name, value) for name, value in values.items()],
            )

    def flush(self) -> None:
        """Nothing is kept back."""

    def set_status(self, status: RunStatus) -> None:
        """Say how the run stands."""
        self._set("status", status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        try:
            self.set_status(status_after(error))
        finally:
            self.close()

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


def name_in_id(name: str) -> str:
    """Return what stands before the last dash in the id of a run of a folder's name."""
    taken = "".join(sign if sign.isprintable() and sign != "\\" else "_" for sign in name)
    return taken.lstrip(".").encode()[:_ID_NAME_BYTES].decode(errors="ignore") or "run"


def _new_id(name: str) -> str:
    return f"{name_in_id(name)}-{secrets.token_hex(_ID_BYTES)}"


def _check_no_run(folder: Path) -> None:
    for name in (DATABASE_FILE, CONFIG_FILE, ENVIRONMENT_FILE):
        if (folder / name).exists():
            raise RunFolderError(
                f"{folder} holds a run already, there is a {name}; {_way_on(folder)}choose another "
                "folder or remove this one"
            )


def _way_on(folder: Path) -> str:
    """Return how to go on with a folder's run; nothing where that cannot be."""
    try:
        reader = RunReader(folder)
        check_own(reader)
        check_unfinished(reader)
    except RunFolderError:
        return ""
    return "go on with it (esper resume, or ReopenedRunStore in a loop of your own), "


def _remove_run(folder: Path) -> None:
    """Remove what was made of a run that cannot begin, while its folder is locked."""
    for name in RUN_FILES:
        if name != LOCK_FILE:
            (folder / name).unlink(missing_ok=True)


def check_own(reader: RunReader) -> None:
    """Raise a `RunFolderError` if a folder is what a router writes of a run elsewhere."""
    if reader.is_mirror:
        raise RunFolderError(
            f"{reader.folder} is a mirror of a run elsewhere; resume it on its own machine"
        )


def check_unfinished(reader: RunReader) -> None:
    """Raise a `RunFolderError` if a run is finished."""
    if reader.status == "finished":
        raise RunFolderError(
            f"{reader.folder} holds a run that is finished; there is nothing to resume"
        )


class ReopenedRunStore(RunStore):
    """Goes on writing the folder of a run that was stopped.

    Args:
        folder: Of a run.
        after_step: The last step that the run still knows of; what was written of later ones is
            forgotten. Below 0 that is everything. None leaves all as it is until `go_on`, and only
            keeps others from writing it.
        unfinished: Whether a run that is finished is to be left alone.

    Raises:
        RunFolderError: It is no run folder, of another version, a mirror, or a process writes it;
            or the run is finished, perhaps since it was looked at, and is to be left alone then.
    """

    def __init__(
        self, folder: str | Path, *, after_step: int | None, unfinished: bool = False
    ) -> None:
        folder = Path(folder)
        RunReader(folder)  # before anything is made where there is no run

        def begin(_: ExitStack) -> None:
            now = RunReader(folder)
            check_own(now)
            if unfinished:
                check_unfinished(now)

        self._has_begun = False
        """Whether the folder knows of the run's beginning."""
        self._open(folder, begin)
        if after_step is not None:
            with self._let_go_on_error():
                self.go_on(after_step)

    def go_on(self, after_step: int, *, after_epoch: int = sys.maxsize) -> None:
        """Forget what was written of steps after this one, and say that the run goes on.

        Args:
            after_step: The last that the run still knows of; below 0 it knows of none.
            after_epoch: The last decision that it still knows of, `Growth.epoch`: of that very step
                a later one is forgotten too.
        """
        with self._transaction():
            attempt = RunReader(self.folder).attempt
            for forget in (_FORGET_EVENTS, _FORGET_METRICS):
                self._database.execute(forget, (after_step, after_epoch))
            self._set("attempt", str(attempt + 1))
            self._set("status", "running")
            (self._has_begun,) = self._database.execute(_HAS_BEGUN).fetchone()

    def publish(self, record: EventRecord) -> None:
        """Store one event, but no second beginning: a loop of one's own tells each new sink."""
        if not (self._has_begun and isinstance(record.event, RunStarted)):
            super().publish(record)
