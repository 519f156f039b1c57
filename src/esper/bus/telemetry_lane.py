"""One stream of a run's telemetry on its way to the bus: queued, sealed, sent or kept."""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from esper.bus.bus import Stream
from esper.bus.envelope import MAX_BODY_BYTES, Sealer, messages_in
from esper.bus.messages import (
    EventMessage,
    Message,
    MetricsMessage,
    RunMessage,
    body_of,
    bundle_of,
)
from esper.bus.spool import Spool
from esper.lifecycle.events import Event, EventRecord, Priority

WENT_BACK = "run_went_back"

BATCH_MESSAGES = 500
"""Sent at once: a later emergency waits for no more than that."""
_BUNDLE_BYTES = 1 << 13
"""Of the messages in one envelope, unless it holds but one."""

Measured = tuple[int, int, Mapping[str, float]]
"""Epoch, step, and named values."""
Item = EventRecord | Measured | Message

_LOG = logging.getLogger(__name__)


def is_emergency(event: Event) -> bool:
    """Whether an event overtakes others: a warning does, but not what revokes those before it."""
    return event.priority is not Priority.NORMAL and event.type != WENT_BACK


class TelemetryLane:
    """Takes items by `put`, from any thread; one other thread does the rest.

    What finds no room, in the queue or in the spool, is the oldest; the sequence numbers that it
    has, or would have had, tell whoever receives the others how many they miss. What the disk does
    not take waits in memory: a batch that is sealed, and the queue behind it.

    Args:
        stream: Where everything goes.
        sealer: Of nobody else.
        spool: Of nobody else; what it holds from earlier goes first.
        max_queued: Items that wait to be sealed, 2 or more.
    """

    def __init__(self, stream: Stream, sealer: Sealer, spool: Spool, *, max_queued: int) -> None:
        self.stream = stream
        self._sealer = sealer
        self._spool = spool
        self._max_queued = max_queued
        self._lock = threading.Lock()
        """Held for a moment only, never while anything is written, sent or sealed."""
        self._queue: deque[Item] = deque()
        self._overflow = 0
        """Items that were dropped since the last one was taken; all in the queue are younger."""
        self._in_flight: list[bytes] = []
        self._in_flight_spooled = False
        self._refused: list[bytes] = []
        """Sealed, and the disk did not take them; younger than all that is in the spool."""
        self._lost = 0
        self._told_unsendable = False

    def put(self, item: Item) -> int:
        """Take an item, and return how many wait now."""
        with self._lock:
            self._queue.append(item)
            waiting = len(self._queue)
            if waiting > self._max_queued:
                oldest = self._queue.popleft()
                if isinstance(oldest, RunMessage):  # without which nobody can tell what holds
                    self._queue[0] = oldest
                self._overflow += 1
        return waiting

    @property
    def kept_messages(self) -> int:
        """How many are in the spool."""
        return len(self._spool)

    def take_lost(self) -> int:
        """Return how many messages were lost for good since the last call."""
        lost, self._lost = self._lost, 0
        return lost

    def next_batch(self) -> list[bytes]:
        """Return the messages that are to be sent now, the oldest first; none, if there are none.

        They are in flight until `sent` or `keep`.
        """
        assert not self._in_flight
        if len(self._spool):
            self.keep()
            self._in_flight, lost = self._spool.first(limit=BATCH_MESSAGES)
            self._lost += lost
            self._in_flight_spooled = True
        if not self._in_flight:
            self._in_flight, self._refused = self._refused or self._sealed(BATCH_MESSAGES), []
            self._in_flight_spooled = False
        return self._in_flight

    def sent(self) -> None:
        """Take note that all that was in flight has arrived."""
        if self._in_flight_spooled:
            self._spool.sent(len(self._in_flight))
        self._in_flight = []

    def keep(self) -> None:
        """Keep in the spool all that is in flight or waits; it may have arrived, too.

        What the disk does not take waits on.
        """
        if self._in_flight and not self._in_flight_spooled:
            self._refused = self._in_flight
        self._in_flight = []
        while messages := self._refused or self._sealed(BATCH_MESSAGES):
            dropped, self._refused = self._spool.append(messages)
            self._lost += dropped
            if self._refused:
                break

    def close(self) -> None:
        """Keep all that waits, and let go of the spool's files; what it does not take is lost."""
        self.keep()
        while messages := self._refused or self._sealed(BATCH_MESSAGES):
            self._lost += sum(map(messages_in, messages))
            self._refused = []
        self._spool.close()

    def _sealed(self, limit: int) -> list[bytes]:
        """Take items out of the queue, and return them as messages."""
        messages: list[bytes] = []
        while not messages:
            with self._lock:
                overflow, self._overflow = self._overflow, 0
                items = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
            self._sealer.skip(overflow)
            self._lost += overflow
            if not items:
                break
            messages += self._bundled(items)
        return messages

    def _bundled(self, items: Iterable[Item]) -> Iterator[bytes]:
        """Yield items in envelopes, as many in one as fit; what cannot be sent is lost."""
        bodies: list[bytes] = []
        num_bytes = 0
        for item in items:
            body = self._body(item)
            alone = body is None or not isinstance(item, (EventRecord, tuple))
            if bodies and (alone or body is None or num_bytes + len(body) > _BUNDLE_BYTES):
                yield self._sealer.seal(bundle_of(bodies), messages=len(bodies))[1]
                bodies, num_bytes = [], 0
            if body is None:
                self._sealer.skip(1)
            elif alone:
                yield self._sealer.seal(body)[1]
            else:
                bodies.append(body)
                num_bytes += len(body)
        if bodies:
            yield self._sealer.seal(bundle_of(bodies), messages=len(bodies))[1]

    def _body(self, item: Item) -> bytes | None:
        """Return an item as the body of an envelope; None if it cannot be, the first is told of."""
        try:
            body = body_of(_message(item))
            if len(body) <= MAX_BODY_BYTES:
                return body
            problem = f"it has {len(body)} bytes"
        except ValueError as error:
            problem = type(error).__name__  # not its text, which quotes values
        self._lost += 1
        if not self._told_unsendable:
            self._told_unsendable = True
            kind = item.event.type if isinstance(item, EventRecord) else type(item).__name__
            _LOG.warning("%s cannot be sent: %s", kind, problem)
        return None


def _message(item: Item) -> Message:
    if isinstance(item, EventRecord):
        return EventMessage(record=item)
    if isinstance(item, tuple):
        epoch, step, metrics = item
        return MetricsMessage(epoch=epoch, step=step, metrics=dict(metrics))
    return item
