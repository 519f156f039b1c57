"""An arm's loss over what its runs cost, and what it is between them."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from esper.experiments.comparison.intervals import REACH, Curve, loss_at
from esper.experiments.comparison.runs import RunResult

Runs = Mapping[int, Sequence[RunResult]]
"""By random seed."""


def curve_of(runs: Sequence[RunResult], cost: Callable[[RunResult], float]) -> Curve:
    """Return one seed's budgets as pairs of cost and test loss, rising; the mean at equal costs."""
    losses: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        losses[cost(run)].append(run.test["loss"])
    return [(spent, statistics.fmean(found)) for spent, found in sorted(losses.items())]


def losses_at(runs: Runs, grown: Mapping[int, RunResult]) -> list[float] | None:
    """Return losses at the grown runs' operations, seed by seed; None where runs do not reach.

    Between two runs the loss is taken as linear in the logarithm of the operations. Loss falls less
    and less, so that it is lower in truth: an error in favour of growth, the larger the further
    the runs lie apart.
    """
    losses = []
    for seed, run in grown.items():
        curve = curve_of(runs[seed], lambda result: result.flops)
        if not curve or not curve[0][0] / REACH <= run.flops <= curve[-1][0] * REACH:
            return None
        losses.append(loss_at(curve, run.flops))
    return losses
