"""Whether a run reaches the bus: one warning an outage, one event when it is over."""

import threading
import time
from collections.abc import Callable

from esper.lifecycle.events import BusLost, BusRegained, Event


class LinkState:
    """What all that use the bus for one run know of it. For any number of threads.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._since = 0.0
        self._lost_messages = 0
        self._events: list[Event] = []

    def failed(self, concern: str, error: Exception) -> None:
        """Take note that something does not work.

        Args:
            concern: What; of several the first one is told, and the outage ends with the last.
            error: Why.
        """
        with self._lock:
            if not self._failing:
                self._since = self._clock()
                self._events.append(BusLost(concern=concern, error=str(error)))
            self._failing.add(concern)

    def works(self, concern: str) -> None:
        """Take note that something works, again or still."""
        if concern not in self._failing:
            return
        with self._lock:
            self._failing.discard(concern)
            if not self._failing:
                seconds = self._clock() - self._since
                event = BusRegained(seconds=seconds, lost_messages=self._lost_messages)
                self._events.append(event)
                self._lost_messages = 0

    def lost(self, messages: int) -> None:
        """Count messages that found no room while the bus was away."""
        with self._lock:
            self._lost_messages += messages

    @property
    def has_events(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._events)

    def take_events(self) -> list[Event]:
        """Return what is to be told, once."""
        with self._lock:
            events, self._events = self._events, []
        return events
