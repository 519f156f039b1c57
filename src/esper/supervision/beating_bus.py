"""A bus that shows whether those who read it come round."""

import threading
from collections.abc import Callable, Collection, Sequence

from esper.bus.bus import Bus, BusUnavailableError, Delivery, Stream, Subscription

READING = "reading"
BUS_AWAY = "bus away"


class BeatingBus:
    """A `Bus` whose readers beat once all of them have come round, also where the server is away.

    So one that hangs is seen even if others do not.

    Args:
        bus: Transports.
        streams: Each has a reader, in a thread of its own.
        beat: Is called with "reading", or "bus away" if one of them could not read.
    """

    def __init__(self, bus: Bus, streams: Collection[Stream], beat: Callable[[str], None]) -> None:
        self._bus = bus
        self._all = frozenset(stream.name for stream in streams)
        self._beat = beat
        self._lock = threading.Lock()
        self._missing = set(self._all)
        self._away = False

    def publish(self, stream: Stream, messages: Sequence[bytes]) -> Sequence[str]:
        """Append messages to a stream."""
        return self._bus.publish(stream, messages)

    def subscribe(
        self, stream: Stream, *, group: str, consumer: str, idle_seconds: float = 30.0
    ) -> Subscription:
        """Read a stream; each look at it counts as a round."""
        try:
            subscription = self._bus.subscribe(
                stream, group=group, consumer=consumer, idle_seconds=idle_seconds
            )
        except BusUnavailableError:
            self.came_round(stream, away=True)
            raise
        return _BeatingSubscription(self, stream, subscription)

    def latest(self, stream: Stream, *, limit: int) -> Sequence[Delivery]:
        """Return the newest messages of a stream."""
        return self._bus.latest(stream, limit=limit)

    def after(
        self, stream: Stream, entry: str | None, *, limit: int, wait_seconds: float
    ) -> Sequence[Delivery]:
        """Return the messages after an entry."""
        return self._bus.after(stream, entry, limit=limit, wait_seconds=wait_seconds)

    def close(self) -> None:
        """Let go of the server."""
        self._bus.close()

    def came_round(self, stream: Stream, *, away: bool) -> None:
        """Take note that the reader of a stream does not hang."""
        with self._lock:
            self._missing.discard(stream.name)
            self._away = self._away or away
            if not self._missing:
                self._beat(BUS_AWAY if self._away else READING)
                self._missing, self._away = set(self._all), False


class _BeatingSubscription:
    """Reads, or keeps what cannot be dealt with now: either is a round."""

    def __init__(self, bus: BeatingBus, stream: Stream, subscription: Subscription) -> None:
        self._bus = bus
        self._stream = stream
        self._subscription = subscription

    def receive(self, *, limit: int, wait_seconds: float) -> Sequence[Delivery]:
        try:
            received = self._subscription.receive(limit=limit, wait_seconds=wait_seconds)
        except BusUnavailableError:
            self._bus.came_round(self._stream, away=True)
            raise
        self._bus.came_round(self._stream, away=False)
        return received

    def renew(self, entries: Collection[str]) -> None:
        self._subscription.renew(entries)
        self._bus.came_round(self._stream, away=False)

    def reclaim(self) -> None:
        self._subscription.reclaim()

    def acknowledge(self, entries: Collection[str]) -> None:
        self._subscription.acknowledge(entries)

    def refuse(self, delivery: Delivery, reason: str) -> None:
        self._subscription.refuse(delivery, reason)

    def close(self) -> None:
        self._subscription.close()
