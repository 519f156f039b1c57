"""A circuit breaker around work that may keep failing."""

import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from esper.lifecycle.events import BreakerChanged, Event


class BreakerState(StrEnum):
    """Whether work may be tried."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after repeated failures, and lets one attempt through after a cool-down.

    Args:
        name: What it guards, for events.
        max_failures: Failures in a row that open it.
        cooldown_seconds: How long it stays open before one attempt is let through.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        max_failures: int = 3,
        cooldown_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.max_failures = max_failures
        self.cooldown_seconds = cooldown_seconds
        self._clock = clock
        self._failures = 0
        self._opened_at = 0.0
        self._state = BreakerState.CLOSED

    @property
    def state(self) -> BreakerState:
        """The state now; OPEN turns HALF_OPEN when the cool-down has passed."""
        waited = self._clock() - self._opened_at
        if self._state is BreakerState.OPEN and waited >= self.cooldown_seconds:
            return BreakerState.HALF_OPEN
        return self._state

    @property
    def allows(self) -> bool:
        """Whether work may be tried now."""
        return self.state is not BreakerState.OPEN

    def succeeded(self) -> list[Event]:
        """Note a success, which closes the breaker.

        Returns:
            Every change since the last call, the half-opening before the closing included.
        """
        events = self._become(self.state)
        self._failures = 0
        return [*events, *self._become(BreakerState.CLOSED)]

    def failed(self) -> list[Event]:
        """Note a failure; the one too many, or one while HALF_OPEN, opens the breaker.

        Returns:
            Every change since the last call, the half-opening before the opening included.
        """
        events = self._become(self.state)
        self._failures += 1
        # Failures are kept while it is open, so one while HALF_OPEN is always one too many.
        if self._failures >= self.max_failures:
            self._opened_at = self._clock()
            events += self._become(BreakerState.OPEN)
        return events

    def state_dict(self) -> dict[str, Any]:
        """Return how it stands; of the cool-down, what is left."""
        waited = self._clock() - self._opened_at
        left = max(0.0, self.cooldown_seconds - waited) if self._state is BreakerState.OPEN else 0.0
        return {"state": self._state.value, "failures": self._failures, "seconds_left": left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand as it stood then."""
        self._state = BreakerState(state["state"])
        self._failures = state["failures"]
        self._opened_at = self._clock() - self.cooldown_seconds + state["seconds_left"]

    def _become(self, after: BreakerState) -> list[Event]:
        before, self._state = self._state, after
        if before is after:
            return []
        return [
            BreakerChanged(
                breaker=self.name, from_state=before, to_state=after, failures=self._failures
            )
        ]
