"""The bus: streams of messages, read by groups of consumers, each message by one of a group."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

MAX_DELIVERIES = 5
"""A message that nobody has acknowledged after so many is a dead letter."""
GIVEN_UP = f"nobody has acknowledged it in {MAX_DELIVERIES} deliveries"
"""The reason for that."""

_ENTRY = re.compile(r"([0-9]+)-([0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where messages are kept, in the order in which they came.

    Attributes:
        name: The same for all who use it.
        max_length: How many are kept at most, older ones go; None keeps all, for what must never be
            lost.
    """

    name: str
    max_length: int | None


def commands_for(run: str) -> Stream:
    """Return where a run is told what to do; never trimmed."""
    return Stream(name=f"commands:{_plain(run)}", max_length=None)


def answers_from(run: str) -> Stream:
    """Return where a run says what came of commands."""
    return Stream(name=f"answers:{_plain(run)}", max_length=1_000)


EMERGENCY = Stream(name="emergency", max_length=50_000)
"""Events that a person must see at once, of all runs."""
TELEMETRY = Stream(name="telemetry", max_length=50_000)
"""All other events and metrics, of all runs; several in one envelope where there are many."""
HEALTH = Stream(name="health", max_length=2_000)
"""Signs of life of all services."""
DEAD_LETTERS = Stream(name="dead", max_length=10_000)
"""What was refused, or failed too often; each is a `DeadLetter` as JSON."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A message as one consumer has received it.

    Attributes:
        entry: Identifies it in its stream; later ones are greater, by `entry_order`.
        message: As it was published.
        deliveries: How often it was given to a consumer of the group, this time included; 0 where
            it was looked at without one.
    """

    entry: str
    message: bytes
    deliveries: int


class BusUnavailableError(OSError):
    """The server cannot be reached, or does not take anything now; it may soon."""


class BusRefusedError(RuntimeError):
    """The server refuses what it is asked, and will until a person changes something."""


class Subscription(Protocol):
    """One consumer's place in a group that reads a stream.

    For one thread at a time; another one may `renew` meanwhile.
    """

    def receive(self, *, limit: int, wait_seconds: float) -> Sequence[Delivery]:
        """Return messages that no other consumer of the group has, in their order.

        First those that some consumer has had for too long without acknowledging or renewing them,
        this one included, then new ones. One that was delivered `MAX_DELIVERIES` times already goes
        to the dead letters instead.

        Args:
            limit: At most so many.
            wait_seconds: For a first one; 0 does not wait. There may be none after that time.

        Raises:
            BusUnavailableError: Nothing has changed.
        """

    def reclaim(self) -> None:
        """Let the next `receive` take what other consumers of the group hold, however short.

        For a group in which only one consumer can live at a time.
        """

    def acknowledge(self, entries: Collection[str]) -> None:
        """Say that messages are dealt with; they will not be delivered to this group again.

        Raises:
            BusUnavailableError: They may be delivered again.
        """

    def renew(self, entries: Collection[str]) -> None:
        """Say that messages are still being worked on, so that nobody else takes them.

        Raises:
            BusUnavailableError: Somebody else may take them.
        """

    def refuse(self, delivery: Delivery, reason: str) -> None:
        """Put a message among the dead letters, and acknowledge it, both or nothing.

        Raises:
            BusUnavailableError: It will be delivered again.
        """

    def close(self) -> None:
        """Leave the group; what was not acknowledged is left to others."""


class Bus(Protocol):
    """Transports messages as they are. For any number of threads."""

    def publish(self, stream: Stream, messages: Sequence[bytes]) -> Sequence[str]:
        """Append messages to a stream in this order, and return their entries.

        Raises:
            BusUnavailableError: Not all of them are known to be in it; some may be.
        """

    def subscribe(
        self, stream: Stream, *, group: str, consumer: str, idle_seconds: float = 30.0
    ) -> Subscription:
        """Read a stream as one consumer of a group, which begins with the oldest message.

        Args:
            stream: To read.
            group: Each message goes to one consumer of it.
            consumer: This one's name in the group.
            idle_seconds: After which a message that was neither acknowledged nor renewed is taken
                from its consumer.

        Raises:
            BusUnavailableError: Nothing has changed.
        """

    def latest(self, stream: Stream, *, limit: int) -> Sequence[Delivery]:
        """Return the newest messages of a stream, oldest first, whoever has read them.

        Raises:
            BusUnavailableError: As above.
        """

    def after(
        self, stream: Stream, entry: str | None, *, limit: int, wait_seconds: float
    ) -> Sequence[Delivery]:
        """Return the messages after an entry, oldest first, whoever has read them.

        Args:
            stream: To read.
            entry: From `publish`, or of a delivery; None begins with the oldest.
            limit: At most so many.
            wait_seconds: For a first one; 0 does not wait.

        Raises:
            BusUnavailableError: As above.
        """

    def close(self) -> None:
        """Let go of the server."""


def entry_order(entry: str) -> tuple[int, int]:
    """Return what orders the entries of a stream.

    Raises:
        ValueError: It is none.

    Example:
        >>> max("9-1", "10-0", "10-2", key=entry_order)
        '10-2'
    """
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise ValueError(f"an entry is written NUMBER-NUMBER, got {entry!r}")
    return int(found[1]), int(found[2])


def check_limit(limit: int) -> None:
    """Raise unless something can be returned.

    Raises:
        ValueError: The limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"the limit of messages must be 1 or more, got {limit}")


def _plain(run: str) -> str:
    return quote(run, safe="")
