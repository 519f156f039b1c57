"""Brings what runs tell to where people look at it."""

import errno
import logging
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from pathlib import Path

from esper.bus.backoff import Backoff
from esper.bus.bus import (
    EMERGENCY,
    TELEMETRY,
    Bus,
    BusUnavailableError,
    Delivery,
    Stream,
    Subscription,
)
from esper.bus.envelope import MessageRefusedError, open_envelope
from esper.bus.held_runs import HeldRuns
from esper.bus.messages import message_in
from esper.bus.mirror import Told, check_telling
from esper.bus.mirrors import Mirrors, check_name
from esper.lifecycle.record import Record
from esper.signing import Keyring
from esper.telemetry.run_folder import RunFolderError

BATCH_MESSAGES = 500
"""Received at once."""
_STORED_AT_ONCE = 250
"""What runs tell, at most, but for a larger bundle; an emergency waits for no more to be stored."""

_WAIT_SECONDS = 0.5
_IDLE_SECONDS = 30.0
_LOOK_SECONDS = 0.05
"""Between two looks whether to end, in a pause."""

_CANNOT_STORE = (sqlite3.Error, OSError, RunFolderError)
"""What storing raises that may work later."""
_SHARED_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
"""Of SQLite: what a full disk or no memory makes of any database."""
_PRIMARY_CODE = 0xFF
"""The bits of an extended result code of SQLite that say what it is a kind of."""
_SHARED_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_TRIED_BYTES = 1 << 20
"""Are written to see whether any run can be stored: more than is left where its batches find no
room."""

_LOG = logging.getLogger(__name__)


class RouterFacts(Record):
    """What a router has done since it was started."""

    stored: int = 0
    again: int = 0
    """Came more than once, and are stored once."""
    missed: int = 0
    """Were lost on their way: later ones of the same run have come."""
    refused: int = 0
    """Could not be trusted or read, and are dead letters."""
    passed_over: int = 0
    """Are of runs that have a folder here which is no mirror, as those that are trained into it."""
    runs: int = 0
    """Whose mirrors are open now."""


class Router:
    """Verifies what runs tell, and stores it in mirrors: run folders that all who read such read.

    Emergencies have a thread of their own. A message is acknowledged when it is stored; however
    often it comes, and whenever this process is killed, it is stored once. How old a message is
    does not matter, it may have waited for the bus; who has signed it does.

    There may be one router for a group at a time: a new one takes at once what another held.

    Args:
        bus: May be away.
        keyring: Verifies.
        folder: That mirrors are in, each under its run's id.
        group: Of the bus; a router of another one gets all messages, too.
        consumer: Its name in the group.
        max_open: Mirrors.
    """

    def __init__(
        self,
        bus: Bus,
        keyring: Keyring,
        folder: Path,
        *,
        group: str = "router",
        consumer: str = "router",
        max_open: int = 64,
    ) -> None:
        self._bus = bus
        self._keyring = keyring
        self._folder = folder
        self._mirrors = Mirrors(folder, max_open=max_open)
        self._group = group
        self._consumer = consumer
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        """Of the counts."""
        self._runs = 0

    def facts(self) -> RouterFacts:
        """Return what was done so far."""
        with self._lock:
            return RouterFacts(**self._counts, runs=self._runs)

    def run(self, stop: threading.Event) -> None:
        """Route until told to stop.

        Raises:
            BusRefusedError: The server will not have it.
        """
        over = threading.Event()

        def ended() -> bool:
            return stop.is_set() or over.is_set()

        # All mirrors are written by one thread: a connection of SQLite's belongs to one.
        with ThreadPoolExecutor(1, "esper-mirrors") as writer:
            with ThreadPoolExecutor(2, "esper-router") as readers:
                routes = [
                    readers.submit(self._route, stream, writer, ended)
                    for stream in (EMERGENCY, TELEMETRY)
                ]
                for _ in as_completed(routes):
                    over.set()  # also where one has failed
            writer.submit(self._mirrors.close).result()
        for route in routes:
            route.result()

    def _route(self, stream: Stream, writer: Executor, ended: Callable[[], bool]) -> None:
        backoff = Backoff()
        subscription: Subscription | None = None
        held = HeldRuns(again_seconds=_IDLE_SECONDS)
        while not ended():
            try:
                if subscription is None:
                    subscription = self._bus.subscribe(
                        stream,
                        group=self._group,
                        consumer=self._consumer,
                        idle_seconds=_IDLE_SECONDS,
                    )
                    subscription.reclaim()  # what a router held that has died, or this one
                    held = HeldRuns(again_seconds=_IDLE_SECONDS)
                self._try_again(held, subscription, writer)
                received = subscription.receive(limit=BATCH_MESSAGES, wait_seconds=_WAIT_SECONDS)
                self._deal_with(received, stream, subscription, writer, held, ended)
                if backoff.failures:
                    _LOG.warning("%s is read again", stream.name)
                backoff.works()
            except BusUnavailableError as error:
                subscription = None
                if not backoff.failures:
                    _LOG.warning("%s, tried again until it works", error)
                _pause(backoff, ended)
        if subscription is not None:
            with suppress(BusUnavailableError):
                subscription.close()

    def _try_again(self, held: HeldRuns, subscription: Subscription, writer: Executor) -> None:
        """Let all that was left come again in its order, once a run of these can be stored."""
        run = held.next_to_try()
        if run is None:
            return
        try:
            writer.submit(self._take, run, ()).result()
        except _CANNOT_STORE:
            return
        subscription.reclaim()
        held.let_go()

    def _deal_with(
        self,
        received: Sequence[Delivery],
        stream: Stream,
        subscription: Subscription,
        writer: Executor,
        held: HeldRuns,
        ended: Callable[[], bool],
    ) -> None:
        """Store messages and acknowledge them; those that cannot be stored now wait.

        What is wrong with one run's folder alone holds up nobody else: its messages are left, and
        later ones of it too, to be delivered again some times, and are dead letters then.
        """
        runs, refused = self._sorted(received, stream, held)
        backoff = Backoff()
        while runs:
            stored: list[str] = []
            try:
                errors = self._store(runs, writer, stored)
            finally:  # also where something has failed that nothing here knows
                subscription.acknowledge(stored)
            for run, problem in errors.items():
                if not backoff.failures:
                    _LOG.warning("what run %s tells cannot be stored now: %s", run, problem)
                if not _concerns_all(problem) and _can_be_written(self._folder):
                    held.hold(run)
            runs = {run: runs[run] for run in errors if run not in held}
            if runs:
                if ended():
                    return  # it is delivered again
                subscription.renew([entry for batch in runs.values() for entry in batch.entries])
                _pause(backoff, ended)
        for delivery, reason in refused:
            subscription.refuse(delivery, reason)
            self._count(refused=1)

    def _sorted(
        self, received: Sequence[Delivery], stream: Stream, held: HeldRuns
    ) -> "tuple[dict[str, _Batch], list[tuple[Delivery, str]]]":
        """Return what each run tells that is not held, and what is refused for what reason."""
        runs: dict[str, _Batch] = {}
        refused: list[tuple[Delivery, str]] = []
        for delivery in received:
            try:
                told = self._opened(delivery, stream)
            except MessageRefusedError as error:
                refused.append((delivery, f"{error.refusal}: {error}"))
                continue
            if told.envelope.run not in held:
                batch = runs.setdefault(told.envelope.run, _Batch())
                batch.entries.append(delivery.entry)
                batch.told.append(told)
        return runs, refused

    def _opened(self, delivery: Delivery, stream: Stream) -> Told:
        """Return what a message says of which run.

        Raises:
            MessageRefusedError: It cannot be trusted, read or stored.
        """
        envelope = open_envelope(delivery.message, self._keyring)
        check_name(envelope.run)
        message = check_telling(envelope, message_in(envelope))
        return Told(stream=stream, envelope=envelope, message=message)

    def _store(
        self, runs: Mapping[str, "_Batch"], writer: Executor, stored: list[str]
    ) -> dict[str, Exception]:
        """Store what can be, and take it off the batches.

        Args:
            runs: The batches, by their runs.
            writer: Runs what writes mirrors.
            stored: Gets the entries that have brought what is stored.

        Returns:
            Why what is left of a run is left.
        """
        errors: dict[str, Exception] = {}
        for run, batch in runs.items():
            while batch.told:
                count = batch.messages_at_once
                try:
                    writer.submit(self._take, run, batch.told[:count]).result()
                except _CANNOT_STORE as error:
                    errors[run] = error
                    break
                stored += batch.entries[:count]
                batch.remove(count)
        return errors

    def _take(self, run: str, told: Sequence[Told]) -> None:
        taken = self._mirrors.take(run, told)
        self._runs = len(self._mirrors)
        if taken is None:
            self._count(passed_over=sum(len(one.envelope.numbers) for one in told))
        else:
            self._count(stored=taken.stored, again=taken.again, missed=taken.missed)

    def _count(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)


@dataclass(frozen=True)
class _Batch:
    """Messages of one run, and the entries that brought them."""

    entries: list[str] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)

    @property
    def messages_at_once(self) -> int:
        """How many of the first are stored together."""
        events = accumulate(len(told.envelope.numbers) for told in self.told)
        return max(1, sum(1 for _ in takewhile(lambda sum_: sum_ <= _STORED_AT_ONCE, events)))

    def remove(self, count: int) -> None:
        """Remove the first."""
        del self.entries[:count], self.told[:count]


def _concerns_all(error: Exception) -> bool:
    """Return whether no run can be stored, as on a full disk: that is waited for."""
    if isinstance(error, OSError):
        return error.errno in _SHARED_ERRNOS
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)  # not of each error
    return code & _PRIMARY_CODE in _SHARED_CODES


def _can_be_written(folder: Path) -> bool:
    """Return whether a file can be made in a folder; if not, no run can be stored there.

    SQLite's error does not always say so: a quota that is used up is an I/O error to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
    except OSError:
        return False
    return True


def _pause(backoff: Backoff, ended: Callable[[], bool]) -> None:
    """Wait as long as the backoff says, or until the end."""
    end = time.monotonic() + backoff.failed()
    while not ended() and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
