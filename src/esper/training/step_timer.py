"""How long steps take, from the wall clock between them."""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

_WINDOW = 64
_MIN_STEPS = 8


class StepTimer:
    """The median of the last steps' wall times; never waits for a device.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=_WINDOW)

    def step(self) -> None:
        """Note that a step has ended."""
        now = self._clock()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Leave out the time until the next step, as for an evaluation."""
        self._last = None

    def restart(self) -> None:
        """Forget the steps so far: the network is another one now."""
        self._seconds.clear()
        self._last = None

    @property
    def median_seconds(self) -> float | None:
        """The median step, or None before there are enough of them."""
        return median(self._seconds) if len(self._seconds) >= _MIN_STEPS else None
