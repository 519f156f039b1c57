"""Every command that a run has received, each once, with what came of it."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from esper.lifecycle.commands import Command, Outcome, parse_command
from esper.lifecycle.events import EventRecord

BUSY_SECONDS = 30.0
"""A germination may hold the database for as long as it takes to build a seed."""

COMMANDS_SCHEMA = """
CREATE TABLE IF NOT EXISTS commands (
    id TEXT PRIMARY KEY,
    sender TEXT NOT NULL,
    command TEXT NOT NULL,
    received_seconds REAL NOT NULL,
    ordinal INTEGER UNIQUE,
    step INTEGER,
    epoch INTEGER,
    done INTEGER,
    outcome TEXT
)
"""
_COLUMNS = "id, sender, command, received_seconds, ordinal, step, epoch, done, outcome"
_RECEIVE = """
INSERT OR IGNORE INTO commands (id, sender, command, received_seconds) VALUES (?, ?, ?, ?)
"""
_SETTLE = """
UPDATE commands SET ordinal = (SELECT coalesce(max(ordinal), 0) + 1 FROM commands),
step = ?, epoch = ?, done = ?, outcome = ? WHERE id = ? AND outcome IS NULL
"""


class Place(NamedTuple):
    """Where in a run something was done: after so many steps and decisions."""

    step: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class LoggedCommand:
    """A command as it stands.

    Attributes:
        id: Of the message that brought it.
        sender: Who asked.
        received_seconds: When it came first, since the Unix epoch.
        outcome: What came of it; None as long as nothing has.
        place: Where that was; None likewise.
        ordinal: The how manyth command it was to have an outcome; None likewise.
    """

    id: str
    sender: str
    command: Command
    received_seconds: float
    outcome: Outcome | None
    place: Place | None
    ordinal: int | None


class AlreadySettledError(RuntimeError):
    """A command has an outcome already; whoever finds that must not carry it out again."""


class CommandLog:
    """The commands of one run, in a table of its database.

    A command's outcome, and the events that are stored while it is carried out, are committed in
    one transaction: a process that is killed leaves both or nothing.

    Args:
        database: In autocommit mode; the run store's own, whose events are in the transaction.
        busy_seconds: How long it waits for others that hold the database.
        store_event: Stores an event by the same connection; None where there is no run store.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        *,
        busy_seconds: float = BUSY_SECONDS,
        store_event: Callable[[EventRecord], None] | None = None,
    ) -> None:
        self._database = database
        self._store_event = store_event
        database.execute(f"PRAGMA busy_timeout={1000 * busy_seconds:.0f}")
        database.execute(COMMANDS_SCHEMA)

    @classmethod
    @contextmanager
    def open(cls, database_file: Path) -> Iterator[Self]:
        """Open a run's database once more, for another thread or process than the run's own."""
        with closing(sqlite3.connect(database_file, isolation_level=None)) as database:
            yield cls(database)

    @classmethod
    def in_memory(cls) -> Self:
        """Make a log that ends with the process, for one thread."""
        return cls(sqlite3.connect(":memory:", isolation_level=None))

    def receive(
        self, id_: str, sender: str, command: Command, *, received_seconds: float
    ) -> LoggedCommand:
        """Take note of a command if it is new, and return how it stands."""
        row = (id_, sender, command.model_dump_json(), received_seconds)
        self._database.execute(_RECEIVE, row)
        logged = self.find(id_)
        assert logged is not None
        return logged

    @contextmanager
    def settling(self, id_: str, place: Place) -> Iterator[list[Outcome]]:
        """Carry a command out, once.

        What the block stores by the same connection is committed with the outcome that it appends
        to the list; if it raises, nothing is.

        Args:
            id_: Of a command that was received.
            place: Where the run is.

        Raises:
            AlreadySettledError: The command has an outcome; the block is not entered.
            sqlite3.Error: The outcome could not be stored, and may have to be stored again.
        """
        database = self._database
        database.execute("PRAGMA synchronous=FULL")  # what is acknowledged survives a power loss
        try:
            with database:
                database.execute("BEGIN IMMEDIATE")
                logged = self.find(id_)
                if logged is None or logged.outcome is not None:
                    raise AlreadySettledError(f"command {id_} is not open: {logged}")
                outcomes: list[Outcome] = []
                yield outcomes
                (outcome,) = outcomes
                settled = (*place, int(outcome.done), outcome.text, id_)
                database.execute(_SETTLE, settled)
        finally:
            database.execute("PRAGMA synchronous=NORMAL")

    def store_events(self, records: Iterable[EventRecord]) -> None:
        """Store events in the run folder alone, if there is one: others have heard of them.

        Raises:
            sqlite3.Error: Not all of them could be stored.
        """
        if self._store_event is not None:
            for record in records:
                self._store_event(record)

    def find(self, id_: str) -> LoggedCommand | None:
        """Return a command by its id; None if it never came."""
        query = f"SELECT {_COLUMNS} FROM commands WHERE id = ?"  # noqa: S608 – a constant
        row = self._database.execute(query, (id_,)).fetchone()
        return None if row is None else _logged(row)

    def settled(self) -> list[LoggedCommand]:
        """Return all that have an outcome, in the order of it."""
        query = f"SELECT {_COLUMNS} FROM commands WHERE outcome IS NOT NULL ORDER BY ordinal"  # noqa: S608
        return [_logged(row) for row in self._database.execute(query)]


def _logged(row: tuple[Any, ...]) -> LoggedCommand:
    id_, sender, command, received, ordinal, step, epoch, done, text = row
    settled = text is not None
    return LoggedCommand(
        id=id_,
        sender=sender,
        command=parse_command(command),
        received_seconds=received,
        outcome=Outcome(done=bool(done), text=text) if settled else None,
        place=Place(step, epoch) if settled else None,
        ordinal=ordinal,
    )
