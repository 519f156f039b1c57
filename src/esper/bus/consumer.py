"""Deals with the messages of a stream, one after another."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from esper.bus.backoff import Backoff
from esper.bus.bus import (
    MAX_DELIVERIES,
    Bus,
    BusUnavailableError,
    Delivery,
    Stream,
    Subscription,
)
from esper.bus.envelope import MessageRefusedError
from esper.bus.link_state import LinkState

_LIMIT = 100
_WAIT_SECONDS = 0.5
"""How long it takes at most to stop while nothing comes."""
_RENEWALS = 3
"""In the time after which a message is taken away."""

_LOG = logging.getLogger(__name__)


class Consumer:
    """Calls a handler with each message that its group has for it, in the thread that calls `run`.

    A message that the handler returns from is acknowledged, with others that came with it. One that
    it refuses by a `MessageRefusedError` is a dead letter. One for which it raises anything else is
    left, and delivered again after a while, perhaps elsewhere; so is one during which the process
    dies. One that was not dealt with in `MAX_DELIVERIES` is a dead letter too, with the last error
    as the reason. However long the handler takes, nobody else gets what it has.

    Args:
        bus: May be away.
        stream: To read.
        group: Each message goes to one consumer of it.
        name: This one's in the group.
        handle: Is given one delivery; more than once if it or the process fails.
        flush: Makes durable what `handle` has taken; nothing is acknowledged before. If it raises,
            all that were to be acknowledged have failed.
        idle_seconds: After which a message that failed, or whose consumer died, is delivered again.
        link: Is told of outages; without one they are logged.
    """

    def __init__(
        self,
        bus: Bus,
        stream: Stream,
        *,
        group: str,
        name: str,
        handle: Callable[[Delivery], object],
        flush: Callable[[], object] = lambda: None,
        idle_seconds: float = 30.0,
        link: LinkState | None = None,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._group = group
        self._name = name
        self._handle = handle
        self._flush = flush
        self._idle_seconds = idle_seconds
        self._link = link
        self._backoff = Backoff()
        self._away = False
        self._subscription: Subscription | None = None
        self._done: list[Delivery] = []
        self._refused: list[tuple[Delivery, str]] = []
        self._lock = threading.Lock()
        self._held: set[str] = set()
        """Entries that are renewed."""

    def run(self, stop: threading.Event) -> None:
        """Receive messages until told to stop; what is being handled then is still dealt with.

        Raises:
            BusRefusedError: The server will not have it.
        """
        with self._renewing():
            try:
                while not stop.is_set():
                    try:
                        self._work(stop)
                    except BusUnavailableError as error:
                        self._lost(error)
                        stop.wait(self._backoff.failed())
            finally:
                with suppress(BusUnavailableError):  # what is not acknowledged is delivered again
                    self._settle()

    def _work(self, stop: threading.Event) -> None:
        """Receive once, and deal with it."""
        if self._subscription is None:
            self._subscription = self._bus.subscribe(
                self._stream,
                group=self._group,
                consumer=self._name,
                idle_seconds=self._idle_seconds,
            )
        self._settle()  # what the bus was away for
        deliveries = self._subscription.receive(limit=_LIMIT, wait_seconds=_WAIT_SECONDS)
        self._regained()
        with self._lock:
            self._held.update(delivery.entry for delivery in deliveries)
        for delivery in deliveries:
            if stop.is_set():
                break
            self._take(delivery)
        self._settle()

    def _take(self, delivery: Delivery) -> None:
        try:
            self._handle(delivery)
        except MessageRefusedError as error:
            self._refused.append((delivery, f"{error.refusal}: {error}"))
        except Exception as error:  # noqa: BLE001 – whatever it is, it is delivered again
            self._failed(delivery, error)
        else:
            self._done.append(delivery)

    def _failed(self, delivery: Delivery, error: Exception) -> None:
        """Leave a message for another delivery, or give it up."""
        text = f"{type(error).__name__}: {error}"
        if delivery.deliveries >= MAX_DELIVERIES:
            reason = f"it failed in {delivery.deliveries} deliveries, at last by {text}"
            self._refused.append((delivery, reason))
            return
        _LOG.warning(
            "message %s of %s failed, delivery %d of %d: %s",
            *(delivery.entry, self._stream.name, delivery.deliveries, MAX_DELIVERIES, text),
        )
        self._release([delivery])

    def _settle(self) -> None:
        """Acknowledge and refuse what was dealt with."""
        if self._subscription is None:
            return
        if self._done:
            try:
                self._flush()
            except Exception as error:  # noqa: BLE001 – as the handler's
                done, self._done = self._done, []
                for delivery in done:
                    self._failed(delivery, error)
            self._subscription.acknowledge([delivery.entry for delivery in self._done])
            self._release(self._done)
            self._done = []
        while self._refused:
            delivery, reason = self._refused[0]
            self._subscription.refuse(delivery, reason)
            self._release([delivery])
            del self._refused[0]

    def _release(self, deliveries: list[Delivery]) -> None:
        with self._lock:
            self._held.difference_update(delivery.entry for delivery in deliveries)

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        """Renew what is held, now and then, and leave the group at the end."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self._idle_seconds / _RENEWALS):
                with self._lock:
                    held = list(self._held)
                subscription = self._subscription
                if held and subscription is not None:
                    # The thread that acknowledges tells of an outage
                    with suppress(BusUnavailableError):
                        subscription.renew(held)

        thread = threading.Thread(target=renew, name=f"renew {self._stream.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._leave()

    def _leave(self) -> None:
        self._held.clear()
        self._done.clear()
        self._refused.clear()
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _lost(self, error: BusUnavailableError) -> None:
        if self._link is not None:
            self._link.failed(self._stream.name, error)
        elif not self._away:
            _LOG.warning("%s; tried again until it works", error)
        self._away = True

    def _regained(self) -> None:
        self._backoff.works()
        if self._link is not None:
            self._link.works(self._stream.name)
        elif self._away:
            _LOG.warning("the bus is back: receiving of %s", self._stream.name)
        self._away = False
