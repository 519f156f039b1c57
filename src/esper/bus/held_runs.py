"""Runs of which messages were left, and which nothing later may overtake."""

import time
from collections import deque
from collections.abc import Callable

from esper.bus.backoff import Backoff


class HeldRuns:
    """Runs of one stream of which messages were left; what they tell later is left, too.

    So a run's messages are stored in the order in which it has told them. One of the runs is tried
    now and then; once it can be stored, all are let go, and all that was left comes again. As each
    message is delivered a few times only, that is done no more often than they come again anyway.

    Args:
        again_seconds: After which what is left is delivered again without being asked for.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, again_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._again_seconds = again_seconds
        self._clock = clock
        self._runs: deque[str] = deque()
        self._backoff = Backoff()
        self._try_at = 0.0

    def __contains__(self, run: str) -> bool:
        return run in self._runs

    def hold(self, run: str) -> None:
        """Leave what a run tells from now on."""
        self._runs.append(run)

    def next_to_try(self) -> str | None:
        """Return the run that is to be tried now, another one each time; None if none is."""
        if not self._runs or self._clock() < self._try_at:
            return None
        self._try_at = self._clock() + self._backoff.failed()
        self._runs.rotate(-1)
        return self._runs[-1]

    def let_go(self) -> None:
        """Hold none any more: all that was left comes again, before anything later."""
        self._runs.clear()
        self._backoff.works()
        self._try_at = self._clock() + self._again_seconds
