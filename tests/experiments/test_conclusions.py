"""What a comparison concludes from each combination of figures."""

import pytest

from esper.experiments.comparison import Outcome
from esper.experiments.comparison.intervals import Crossing, Interval
from esper.experiments.comparison.summary import EqualFlops, conclude

BETTER = Interval(mean=-0.1, low=-0.15, high=-0.05)
SEEMS_BETTER = Interval(mean=-0.1, low=-0.25, high=0.05)
SEEMS_WORSE = Interval(mean=0.1, low=-0.05, high=0.25)
WORSE = Interval(mean=0.1, low=0.05, high=0.15)
UNKNOWN = Interval(mean=-0.1, low=None, high=None)


def reached(
    low: float | None, high: float | None, ratio: float | None = None, *, last: float = 1.1
) -> Crossing:
    return Crossing(
        ratio=ratio, low=low, high=high, above=ratio is None and high is None, first=0.5, last=last
    )


def from_dear(low: float | None, high: float | None) -> Crossing:
    return Crossing(ratio=None, low=low, high=high, above=high is None, first=1.3, last=1.4)


CHEAPER = reached(0.7, 0.9, 0.8)
NOT_TOLD_APART = reached(0.8, 1.05, 0.95)
SEEMS_DEARER = reached(0.8, None, 1.05)
DEARER = reached(1.1, 1.3, 1.2)


def equal(same_steps: Interval | None, any_steps: Interval | None) -> EqualFlops:
    return EqualFlops(same_steps=same_steps, rival="host", any_steps=any_steps)


def by_one_seed(any_steps: Interval | None) -> EqualFlops:
    return EqualFlops(same_steps=None, rival="host", any_steps=any_steps, nothing_between=True)


@pytest.mark.parametrize(
    ("to_host", "to_static", "at_equal_flops", "outcome"),
    [
        (BETTER, CHEAPER, equal(BETTER, BETTER), Outcome.PAYS),
        # A smaller network does as well with the same compute, if only in more steps.
        (BETTER, CHEAPER, equal(BETTER, WORSE), Outcome.PAYS_PER_STEP),
        # Or may do as well: what is claimed is what is known, that it pays per step.
        (BETTER, CHEAPER, equal(BETTER, SEEMS_BETTER), Outcome.PAYS_PER_STEP),
        (BETTER, CHEAPER, equal(BETTER, SEEMS_WORSE), Outcome.PAYS_PER_STEP),
        # Means are no claim.
        (BETTER, CHEAPER, equal(SEEMS_BETTER, BETTER), Outcome.UNDECIDED),
        (BETTER, CHEAPER, equal(SEEMS_BETTER, SEEMS_BETTER), Outcome.UNDECIDED),
        (BETTER, CHEAPER, equal(SEEMS_BETTER, WORSE), Outcome.UNDECIDED),
        (BETTER, CHEAPER, equal(SEEMS_BETTER, None), Outcome.UNDECIDED),
        # Each condition by itself.
        (SEEMS_BETTER, CHEAPER, equal(BETTER, BETTER), Outcome.UNDECIDED),
        (SEEMS_WORSE, CHEAPER, equal(BETTER, BETTER), Outcome.UNDECIDED),
        (WORSE, CHEAPER, equal(BETTER, BETTER), Outcome.DOES_NOT_PAY),
        (UNKNOWN, CHEAPER, equal(BETTER, BETTER), Outcome.UNDECIDED),
        (BETTER, NOT_TOLD_APART, equal(BETTER, BETTER), Outcome.UNDECIDED),
        (BETTER, DEARER, equal(BETTER, BETTER), Outcome.DOES_NOT_PAY),
        (BETTER, CHEAPER, equal(SEEMS_WORSE, BETTER), Outcome.UNDECIDED),
        (BETTER, CHEAPER, equal(WORSE, BETTER), Outcome.DOES_NOT_PAY),
        (BETTER, CHEAPER, equal(None, BETTER), Outcome.UNDECIDED),
        # Networks that never grew were trained for as many steps only.
        (BETTER, CHEAPER, equal(BETTER, None), Outcome.PAYS_PER_STEP),
        (BETTER, CHEAPER, equal(SEEMS_WORSE, None), Outcome.UNDECIDED),
        (BETTER, CHEAPER, equal(WORSE, None), Outcome.DOES_NOT_PAY),
        (BETTER, CHEAPER, equal(None, None), Outcome.UNDECIDED),
        # There is no size in between to be better than.
        (BETTER, CHEAPER, by_one_seed(BETTER), Outcome.PAYS),
        (BETTER, CHEAPER, by_one_seed(SEEMS_BETTER), Outcome.UNDECIDED),
        (BETTER, CHEAPER, by_one_seed(WORSE), Outcome.UNDECIDED),
        (BETTER, CHEAPER, by_one_seed(None), Outcome.UNDECIDED),
        (BETTER, NOT_TOLD_APART, by_one_seed(BETTER), Outcome.UNDECIDED),
        # A network that never grew is better with the same compute, and growth seems no cheaper.
        (BETTER, SEEMS_DEARER, equal(None, WORSE), Outcome.DOES_NOT_PAY),
        (BETTER, SEEMS_DEARER, equal(None, SEEMS_WORSE), Outcome.UNDECIDED),
        (BETTER, NOT_TOLD_APART, equal(None, WORSE), Outcome.UNDECIDED),
        (BETTER, reached(0.8, None), equal(None, WORSE), Outcome.DOES_NOT_PAY),
        # Curves that lie on one side of the static network's loss all along.
        (BETTER, reached(0.5, 0.5), equal(BETTER, BETTER), Outcome.PAYS),
        (BETTER, reached(0.5, 0.9), equal(BETTER, BETTER), Outcome.PAYS),
        (BETTER, reached(0.5, 1.05), equal(BETTER, BETTER), Outcome.UNDECIDED),
        (BETTER, reached(None, None), equal(BETTER, BETTER), Outcome.DOES_NOT_PAY),
        (BETTER, reached(0.8, None), equal(BETTER, BETTER), Outcome.UNDECIDED),
        # Not measured before 1.3 of the static network's cost, which says nothing of less.
        (BETTER, from_dear(1.3, 1.3), equal(None, None), Outcome.UNDECIDED),
        (BETTER, from_dear(1.3, None), equal(None, SEEMS_WORSE), Outcome.UNDECIDED),
        (BETTER, from_dear(1.35, None), equal(None, None), Outcome.DOES_NOT_PAY),
        (BETTER, from_dear(None, None), equal(None, None), Outcome.DOES_NOT_PAY),
        # Not measured up to the static network's cost, which says nothing of what lies beyond.
        (BETTER, reached(None, None, last=0.9), equal(BETTER, BETTER), Outcome.UNDECIDED),
        (BETTER, reached(0.8, None, last=0.9), equal(None, WORSE), Outcome.UNDECIDED),
        # The runs on the random seeds have no cost in common.
        (BETTER, None, equal(BETTER, BETTER), Outcome.UNDECIDED),
        (BETTER, None, equal(None, WORSE), Outcome.UNDECIDED),
        (BETTER, None, equal(WORSE, BETTER), Outcome.DOES_NOT_PAY),
        (WORSE, None, equal(BETTER, BETTER), Outcome.DOES_NOT_PAY),
    ],
)
def test_conclusion(
    to_host: Interval, to_static: Crossing | None, at_equal_flops: EqualFlops, outcome: Outcome
) -> None:
    assert conclude(to_host, to_static, at_equal_flops) is outcome
