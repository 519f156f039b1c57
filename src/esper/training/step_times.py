"""How long steps take, and how much longer with a seed than before it was there."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

_WINDOW = 64
_MIN_STEPS = 8


class StepTimes:
    """Times the steps of a network that grows; a new seed lets it begin anew, and compare.

    From the wall clock between steps; never waits for a device.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._before: dict[str, float | None] = {}
        """The median step before a slot's last seed was there, by slot."""
        self._network_changes = False
        """The next step is of another network than those that were timed."""

    @property
    def median_seconds(self) -> float | None:
        """The median of the last steps, or None before there are enough of them."""
        return median(self._seconds) if len(self._seconds) >= _MIN_STEPS else None

    def step(self) -> None:
        """Note that a step has ended."""
        if self._network_changes:
            self._begin_anew()
        now = self._clock()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Leave out the time until the next step, as for an evaluation."""
        self._last = None

    def network_changes(self) -> None:
        """Forget the steps so far when the next one has been made."""
        self._network_changes = True

    def seed_comes(self, path: str) -> None:
        """Remember what a step took without the seed that a slot gets now."""
        self._before[path] = self.median_seconds
        self.network_changes()

    def ratio_with_seed(self, path: str) -> float | None:
        """Return a step's time relative to one before the slot's seed; None if one is unknown."""
        now, before = self.median_seconds, self._before.get(path)
        return now / before if now is not None and before else None

    def state_dict(self) -> dict[str, float | None]:
        """Return what steps took before each slot's seed."""
        return dict(self._before)

    def load_state_dict(self, before: Mapping[str, float | None]) -> None:
        """Go on from there; steps are timed anew."""
        self._before = dict(before)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._seconds.clear()
        self._last = None
        self._network_changes = False
