"""Means with 95 % confidence intervals, and where two curves meet."""

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter

CONFIDENCE = 0.95
REACH = 1.02
"""How far beyond its last run a curve still stands for its arm: budgets are whole epochs."""

_GRID = 400


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and where it lies with 95 % confidence; without bounds where there is one value."""

    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Distance of the bounds from the mean; None without bounds."""
        return None if self.high is None else self.high - self.mean

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0.0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0.0


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean with Student's interval.

    Args:
        values: Independent, one per random seed; at least one.
    """
    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Interval(mean=mean, low=None, high=None)
    error = statistics.stdev(values, mean) / math.sqrt(len(values))
    reach = student_quantile(len(values) - 1) * error
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


@cache
def student_quantile(degrees: int, probability: float = 0.5 + CONFIDENCE / 2) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        degrees: Of freedom, at least 1.
        probability: Between 0.5 and 1.

    Source: the distribution's finite series, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 1.0
    while _student_probability(high, degrees) < probability:
        high *= 2.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if _student_probability(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def _student_probability(value: float, degrees: int) -> float:
    """Return the probability that t does not exceed a positive value."""
    angle = math.atan(value / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    series = term if degrees > 1 else 0.0
    for k in range(2 if odd else 1, degrees - 1, 2):
        term *= square * k / (k + 1)
        series += term
    within = 2.0 / math.pi * (angle + sine * series) if odd else sine * series
    return 0.5 + 0.5 * within


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The lowest cost at which a curve reaches a target, relative to what its owner spent.

    Attributes:
        ratio: Where the mean does; None if nowhere, or at the first cost already.
        low: Where it may, by a t-test at 95 %: the lowest cost at which the curve is not told to be
            worse. None if it is worse all along.
        high: Where it certainly does: the lowest cost at which the curve is told to be better.
            None if nowhere.
        above: The mean is worse than the target all along.
        first: The lowest cost at which every seed has a run, or one that cost less.
        last: The highest that every seed's runs reach; at least the first.
    """

    ratio: float | None
    low: float | None
    high: float | None
    above: bool
    first: float
    last: float

    @property
    def below(self) -> bool:
        """Whether the mean is as good as the target at the first cost already."""
        return self.ratio is None and not self.above


Curve = Sequence[tuple[float, float]]
"""Pairs of cost and loss at rising costs, no two the same, each the end of a run of its own."""


def crossing(
    curves: Mapping[int, Curve], targets: Mapping[int, tuple[float, float]]
) -> Crossing | None:
    """Return at which share of the target's cost the curves reach the target's loss.

    None if one of their losses is not finite: a run that diverged has no place on a curve.

    Between two points the loss is taken as linear in the logarithm of the cost; what is tested is
    the paired difference to the target over the seeds. It is tested where every seed's own runs
    enclose the cost: beyond them a line says nothing, least of all through points that cost nearly
    the same.

    Where one seed's runs all cost less than another's, there is no such cost. Tested is then the
    least that no seed has to exceed, those that never came so far at their last run: reached there
    the target is reached, but if it is not, nobody knows what it takes, and None is returned.

    Args:
        curves: By random seed.
        targets: By random seed, the cost and the loss to be reached.
    """
    losses = [loss for _, loss in (*targets.values(), *itertools.chain(*curves.values()))]
    if not all(map(math.isfinite, losses)):
        return None
    shifted = {
        seed: [(math.log(cost / targets[seed][0]), loss - targets[seed][1]) for cost, loss in curve]
        for seed, curve in curves.items()
    }
    first = max(points[0][0] for points in shifted.values())
    shortest = min(points[-1][0] for points in shifted.values())
    last = max(first, shortest)
    grid = [first + (last - first) * step / _GRID for step in range(_GRID + 1)]
    tests = [mean_interval([_at(points, place) for points in shifted.values()]) for place in grid]

    def lowest(holds: Callable[[Interval], bool]) -> float | None:
        found = (math.exp(x) for x, test in zip(grid, tests, strict=True) if holds(test))
        return next(found, None)

    reached = lowest(lambda test: test.mean <= 0.0)
    if reached is None and first > shortest + math.log(REACH):
        return None
    return Crossing(
        ratio=None if reached == math.exp(first) else reached,
        low=lowest(lambda test: not test.above_zero),
        high=lowest(lambda test: test.below_zero),
        above=reached is None,
        first=math.exp(first),
        last=math.exp(last),
    )


def loss_at(curve: Curve, cost: float) -> float:
    """Return the loss at a cost: linear in its logarithm between two points, beyond them the end's.

    A line is not drawn on: through points that cost nearly the same it says nothing beyond them.
    """
    return _at([(math.log(spent), loss) for spent, loss in curve], math.log(cost))


def _at(points: Curve, place: float) -> float:
    """Return the ordinate at `place` of the line through points, beyond them the end's."""
    right = bisect_left(points, place, key=itemgetter(0))
    if right == 0:
        return points[0][1]
    if right == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
