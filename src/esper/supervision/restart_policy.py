"""Whether and when something that has died is started again."""

import time
from collections.abc import Callable

from esper.supervision.config import RestartConfig


class RestartPolicy:
    """Waits that double from one death to the next, and an end to it after several in a row.

    The wait before restart k in a row is min(first · 2^(k-1), longest) seconds. Deaths are in a row
    unless the program was ready for `healthy_seconds` before.

    Args:
        config: The numbers.
        clock: Monotonic seconds.
    """

    def __init__(
        self, config: RestartConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._ready_seconds: float | None = None
        self.restarts = 0
        """In a row."""

    def configure(self, config: RestartConfig) -> None:
        """Go by other numbers from the next death on."""
        self._config = config

    def became_ready(self) -> None:
        """Take note that the program can be used from now on."""
        self._ready_seconds = self._clock()

    def died(self) -> float | None:
        """Return how many seconds to wait before it is started again; None gives it up."""
        ready, self._ready_seconds = self._ready_seconds, None
        config = self._config
        if ready is not None and self._clock() - ready >= config.healthy_seconds:
            self.restarts = 0
        if self.restarts >= config.max_restarts:
            return None
        wait = config.first_seconds
        for _ in range(self.restarts):  # not a power, which overflows
            wait = min(2.0 * wait, config.longest_seconds)
        self.restarts += 1
        return min(wait, config.longest_seconds)
