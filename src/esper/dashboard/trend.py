"""A curve in few points."""

import math


class Trend:
    """A curve in a bounded number of points: when there are too many, every second one goes.

    Values are kept to four digits, as it is drawn as wide as a thumb.

    Args:
        max_points: Even, at least 2.
    """

    def __init__(self, max_points: int = 48) -> None:
        self._max_points = max_points
        self._points: list[float] = []
        self._stride = 1
        self._taken = 0
        self._last: float | None = None

    def take(self, value: float) -> None:
        """Go on with a value; what is not finite is left out."""
        if not math.isfinite(value):
            return
        value = float(f"{value:.4g}")
        if self._taken % self._stride == 0:
            self._points.append(value)
        self._taken += 1
        self._last = value
        if len(self._points) > self._max_points:
            self._points = self._points[::2]
            self._stride *= 2

    def points(self) -> list[float]:
        """Return the curve, its last value included."""
        if self._last is None or (self._taken - 1) % self._stride == 0:
            return list(self._points)
        return [*self._points, self._last]
