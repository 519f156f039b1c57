"""The bus within one process, for its threads."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from esper.bus.bus import (
    DEAD_LETTERS,
    GIVEN_UP,
    MAX_DELIVERIES,
    Delivery,
    Stream,
    check_limit,
    entry_order,
)
from esper.bus.dead_letter import DeadLetter

_SHORTEST_WAIT_SECONDS = 0.001


class InProcessBus:
    """A `Bus` that does what the one by Redis does, and keeps its messages in memory.

    What a stream holds is bounded by its length, as there: one that keeps all grows.

    Args:
        clock: Monotonic seconds, after which messages are taken from their consumers. How long a
            call waits for a first one is real time.

    Example:
        >>> stream = Stream(name="greetings", max_length=10)
        >>> bus = InProcessBus()
        >>> bus.publish(stream, [b"hello"])
        ['1-0']
        >>> reader = bus.subscribe(stream, group="readers", consumer="one")
        >>> [delivery] = reader.receive(limit=1, wait_seconds=0.0)
        >>> delivery.message
        b'hello'
        >>> reader.acknowledge([delivery.entry])
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._logs = _Logs(clock)

    def publish(self, stream: Stream, messages: Sequence[bytes]) -> Sequence[str]:
        """Append messages to a stream in this order, and return their entries."""
        return self._logs.append(stream, messages)

    def subscribe(
        self, stream: Stream, *, group: str, consumer: str, idle_seconds: float = 30.0
    ) -> "_Subscription":
        """Read a stream as one consumer of a group; which one makes no difference here."""
        with self._logs.changed:
            members = self._logs.of(stream).groups.setdefault(group, _Group())
        return _Subscription(self._logs, stream, members, idle_seconds)

    def latest(self, stream: Stream, *, limit: int) -> Sequence[Delivery]:
        """Return the newest messages of a stream, oldest first."""
        check_limit(limit)
        with self._logs.changed:
            log = self._logs.of(stream)
            return log.read(range(max(log.first, log.end - limit), log.end))

    def after(
        self, stream: Stream, entry: str | None, *, limit: int, wait_seconds: float
    ) -> Sequence[Delivery]:
        """Return the messages after an entry, oldest first."""
        check_limit(limit)
        begin = 0 if entry is None else _number(entry) + 1

        def look() -> list[Delivery]:
            log = self._logs.of(stream)
            return log.read(log.numbers(begin, limit))

        return self._logs.wait_for(look, wait_seconds)

    def close(self) -> None:
        """Do nothing: there is no server."""


class _Logs:
    """The streams, and the lock under which they and their groups are read and changed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.changed = threading.Condition()
        self._of: dict[str, _Log] = {}

    def of(self, stream: Stream) -> "_Log":
        return self._of.setdefault(stream.name, _Log())

    def append(self, stream: Stream, messages: Sequence[bytes]) -> list[str]:
        with self.changed:
            log = self.of(stream)
            entries = [log.append(message, stream.max_length) for message in messages]
            self.changed.notify_all()
        return entries

    def wait_for(
        self,
        look: Callable[[], list[Delivery]],
        wait_seconds: float,
        due_seconds: Callable[[], float] = lambda: float("inf"),
    ) -> list[Delivery]:
        """Look until something is found or the time is over.

        Args:
            look: Called whenever something has changed.
            wait_seconds: In all.
            due_seconds: Returns after how long to look again though nothing changes.
        """
        end = time.monotonic() + wait_seconds
        with self.changed:
            while True:
                found = look()
                left = end - time.monotonic()
                if found or left <= 0.0:
                    return found
                self.changed.wait(min(left, due_seconds()))


@dataclass
class _Pending:
    """What a consumer has received and not acknowledged."""

    since: float
    deliveries: int


@dataclass
class _Group:
    """How far a group has read, and what of it is pending, in the order of the stream."""

    next: int = 0
    pending: dict[int, _Pending] = field(default_factory=dict)


class _Log:
    """The messages of a stream, by numbers that count up without a gap."""

    def __init__(self) -> None:
        self.first = 1
        self.end = 1
        self.groups: dict[str, _Group] = {}
        self._messages: dict[int, bytes] = {}

    def append(self, message: bytes, max_length: int | None) -> str:
        """Take one more message, and let go of what is too old, pending or not."""
        number = self.end
        self._messages[number] = message
        self.end += 1
        while max_length is not None and len(self._messages) > max_length:
            del self._messages[self.first]
            for group in self.groups.values():
                group.pending.pop(self.first, None)
            self.first += 1
        return _entry(number)

    def numbers(self, begin: int, limit: int) -> range:
        """Return the numbers of the messages from one on that are still here."""
        begin = max(begin, self.first)
        return range(begin, min(begin + limit, self.end))

    def read(self, numbers: Iterable[int], group: _Group | None = None) -> list[Delivery]:
        return [
            Delivery(
                entry=_entry(number),
                message=self._messages[number],
                deliveries=0 if group is None else group.pending[number].deliveries,
            )
            for number in numbers
        ]


class _Subscription:
    """A place in a group."""

    def __init__(self, logs: _Logs, stream: Stream, group: _Group, idle_seconds: float) -> None:
        self._logs = logs
        self._stream = stream
        self._group = group
        self._idle_seconds = idle_seconds
        self._reclaimed: int | None = None
        """Below it everything was taken that others held; None where nothing is to be."""

    def receive(self, *, limit: int, wait_seconds: float) -> Sequence[Delivery]:
        check_limit(limit)
        return self._logs.wait_for(
            lambda: self._overdue(limit) or self._new(limit), wait_seconds, self._due_seconds
        )

    def reclaim(self) -> None:
        self._reclaimed = 0

    def acknowledge(self, entries: Collection[str]) -> None:
        with self._logs.changed:
            for entry in entries:
                self._group.pending.pop(_number(entry), None)

    def renew(self, entries: Collection[str]) -> None:
        with self._logs.changed:
            for entry in entries:
                pending = self._group.pending.get(_number(entry))
                if pending is not None:
                    pending.since = self._logs.clock()

    def refuse(self, delivery: Delivery, reason: str) -> None:
        letter = DeadLetter.of(
            delivery.message,
            stream=self._stream.name,
            entry=delivery.entry,
            deliveries=delivery.deliveries,
            reason=reason,
        )
        with self._logs.changed:
            self._logs.append(DEAD_LETTERS, [letter.model_dump_json().encode()])
            self.acknowledge([delivery.entry])

    def close(self) -> None:
        """Leave the group: what is pending has only to become overdue."""

    def _overdue(self, limit: int) -> list[Delivery]:
        """Take what some consumer has held for too long, or what is to be reclaimed."""
        now = self._logs.clock()
        taken: list[int] = []
        dead: list[int] = []
        for number, pending in self._group.pending.items():
            if len(taken) == limit:
                break
            if self._reclaimed is None:
                due = now - pending.since >= self._idle_seconds
            else:
                due = number >= self._reclaimed
                self._reclaimed = max(number + 1, self._reclaimed)
            if due and pending.deliveries >= MAX_DELIVERIES:
                dead.append(number)
            elif due:
                pending.since = now
                pending.deliveries += 1
                taken.append(number)
        else:
            self._reclaimed = None
        log = self._logs.of(self._stream)
        found, given_up = log.read(taken, self._group), log.read(dead, self._group)
        for delivery in given_up:
            self.refuse(delivery, GIVEN_UP)
        return found

    def _new(self, limit: int) -> list[Delivery]:
        """Take what nobody in the group has received yet."""
        log = self._logs.of(self._stream)
        numbers = log.numbers(self._group.next, limit)
        for number in numbers:
            self._group.pending[number] = _Pending(since=self._logs.clock(), deliveries=1)
            self._group.next = number + 1
        return log.read(numbers, self._group)

    def _due_seconds(self) -> float:
        """Return in how long the next pending message is overdue."""
        since = min((pending.since for pending in self._group.pending.values()), default=None)
        if since is None:
            return float("inf")
        return max(since + self._idle_seconds - self._logs.clock(), _SHORTEST_WAIT_SECONDS)


def _entry(number: int) -> str:
    return f"{number}-0"


def _number(entry: str) -> int:
    return entry_order(entry)[0]
