"""How long to wait before a server is tried again."""

import random
from collections.abc import Callable

_FIRST_SECONDS = 0.1
_LONGEST_SECONDS = 2.0


class Backoff:
    """Waits that double from 0.1 s to 2 s, each drawn between half of it and all of it.

    Drawn, so that many that have lost one server do not come back to it all at once; from a random
    stream of its own, so that no run is changed by it.

    Args:
        draw: Returns a number from 0 to 1.
    """

    def __init__(self, draw: Callable[[], float] | None = None) -> None:
        self._draw = random.Random().random if draw is None else draw  # noqa: S311
        self._next_seconds = _FIRST_SECONDS
        self.failures = 0
        """Since it worked last."""

    def failed(self) -> float:
        """Return the seconds to wait now."""
        self.failures += 1
        seconds = self._next_seconds
        self._next_seconds = min(2.0 * seconds, _LONGEST_SECONDS)
        return seconds * (0.5 + 0.5 * self._draw())

    def works(self) -> None:
        """Begin with the shortest wait again."""
        self.failures = 0
        self._next_seconds = _FIRST_SECONDS
