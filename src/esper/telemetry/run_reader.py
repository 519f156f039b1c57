"""Reading a run folder, also while the run goes on."""

import json
import math
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.lifecycle.events import EventRecord, parse_event_record
from esper.telemetry.run_folder import (
    CONFIG_FILE,
    DATABASE_FILE,
    ENVIRONMENT_FILE,
    STORE_VERSION,
    RunFolderError,
    is_written,
    read_json,
)

MIRROR_KEY = "mirror"
"""In the table of a run that is trained elsewhere, of which this folder is a mirror."""

_READ_TIMEOUT_SECONDS = 0.5

_EVENTS = "SELECT id, record FROM events WHERE id > ? ORDER BY id LIMIT ?"
_EVENTS_OF_TYPES = """
SELECT id, record FROM events WHERE id > ? AND type IN (SELECT value FROM json_each(?))
ORDER BY id LIMIT ?
"""
_METRICS = "SELECT id, epoch, step, name, value FROM metrics"
_FIRST_TIME = "SELECT time_seconds FROM events ORDER BY id LIMIT 1"
_LAST_EVENT = "SELECT time_seconds, epoch, step FROM events ORDER BY id DESC LIMIT 1"
_LAST_METRIC = "SELECT epoch, step FROM metrics ORDER BY id DESC LIMIT 1"


def standing(status: str, *, has_writer: bool, is_mirror: bool) -> str:
    """Return how a run stands for those who look at it: its status, or "killed".

    A mirror stands as its run has told last, also where that was killed since: whether a router has
    the folder open says nothing of the run.

    Args:
        status: That it has written.
        has_writer: Whether a process wrote its folder, asked before the status was read: a run that
            ends says so first. Not known on Windows, where no run counts as killed.
        is_mirror: Whether the run is trained elsewhere.
    """
    killed = status == "running" and not (has_writer or is_mirror) and os.name == "posix"
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
    is_mirror: bool
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

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
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
        return standing(self.status, has_writer=has_writer, is_mirror=self.is_mirror)

    @property
    def is_mirror(self) -> bool:
        """Whether the run is trained elsewhere, and a router writes here what it tells."""
        return self._value(MIRROR_KEY) is not None

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
        """Whether a process writes the folder now; of a mirror that is a router, and not the run.

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
            is_mirror=MIRROR_KEY in kept,
            event_counts=counts,
            first_seconds=first and first[0],
            last_seconds=last_seconds,
            epoch=epoch,
            step=step,
        )

    def config(self) -> dict[str, Any]:
        """Return what was chosen for the run."""
        return read_json(self.folder / CONFIG_FILE)

    def environment(self) -> dict[str, Any]:
        """Return versions, device and settings of the run."""
        return read_json(self.folder / ENVIRONMENT_FILE)

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
