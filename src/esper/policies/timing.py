"""When a network grows, apart from what grows in it."""

import math
import statistics
from collections.abc import Sequence
from typing import Protocol

from esper.lifecycle.actions import GrowthState

_MIN_POINTS = 3


class GrowthTiming(Protocol):
    """Says when the next growth event is due. Pure: it keeps nothing between calls."""

    @property
    def num_events(self) -> int:
        """How many events a run has, at least 1; the new depth is shared among them."""

    @property
    def reads_losses(self) -> bool:
        """Whether it goes by the held-out loss, whose evaluation is a cost of growing then."""

    def due(self, state: GrowthState, *, num_past: int) -> bool:
        """Return whether the next event is due.

        Args:
            state: After an epoch, with the losses so far.
            num_past: Events that have been due before, less than `num_events`.
        """


class FractionTiming:
    """Events at fixed shares of the run.

    Args:
        fractions: Of the decisions of the run, rising.
    """

    reads_losses = False

    def __init__(self, fractions: Sequence[float]) -> None:
        self.fractions = tuple(fractions)

    @property
    def num_events(self) -> int:
        return len(self.fractions)

    def due(self, state: GrowthState, *, num_past: int) -> bool:
        return elapsed_fraction(state) >= self.fractions[num_past]


class SlopeTiming:
    """One event, once the network by itself has little left to gain in the time that remains.

    It is due when the training loss, falling on along its present slope to the end of the run,
    would fall by no more than a share of itself. The slope is that of a power law, fitted to the
    later half of the epochs so far; with b its exponent and f the elapsed share of the run, the
    share is b (1 - f) / f.

    Args:
        max_drop_fraction: That share; a larger one grows earlier.
        earliest_fraction: Of the run, before which no slope is trusted.
        latest_fraction: Of the run, at which it is due in any case.

    Raises:
        ValueError: An argument is out of its range.

    Source: original; power laws of loss over steps as in Kaplan et al. 2020 (arXiv 2001.08361).
        Compared with fixed shares in docs/when_growth_pays.md.
    """

    num_events = 1
    reads_losses = False

    def __init__(
        self, max_drop_fraction: float, *, earliest_fraction: float, latest_fraction: float
    ) -> None:
        if not max_drop_fraction > 0.0:
            raise ValueError(f"max_drop_fraction must be above 0, got {max_drop_fraction}")
        if not 0.0 <= earliest_fraction <= latest_fraction <= 1.0:
            raise ValueError(
                "earliest_fraction and latest_fraction must rise between 0 and 1, got "
                f"{earliest_fraction} and {latest_fraction}"
            )
        self.max_drop_fraction = max_drop_fraction
        self.earliest_fraction = earliest_fraction
        self.latest_fraction = latest_fraction

    def due(self, state: GrowthState, *, num_past: int) -> bool:
        elapsed = elapsed_fraction(state)
        if len(state.train_losses) < state.epoch:
            raise ValueError(
                "the slope timing decides by the training loss, and the loop does not tell it; "
                "pass it: growth.after_epoch(evaluate, train_loss=…)"
            )
        if elapsed < self.earliest_fraction:
            return False
        if elapsed >= self.latest_fraction:
            return True
        exponent = power_law_exponent(state.train_losses)
        return exponent is not None and exponent * (1.0 - elapsed) / elapsed <= (
            self.max_drop_fraction
        )


def power_law_exponent(losses: Sequence[float]) -> float | None:
    """Return b of `loss ∝ epoch ** -b`, by least squares in logarithms over the later half.

    Args:
        losses: Of each epoch, oldest first; those that are not positive and finite are left out.

    Returns:
        None where fewer than three epochs are left.
    """
    points = [
        (math.log(epoch), math.log(loss))
        for epoch, loss in enumerate(losses, start=1)
        if epoch > len(losses) // 2 and 0.0 < loss < math.inf
    ]
    if len(points) < _MIN_POINTS:
        return None
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return -slope


def elapsed_fraction(state: GrowthState) -> float:
    """Return the share of the run's decisions that have been made, this one included.

    Raises:
        ValueError: It is not known how many there will be.
    """
    if state.max_epochs is None:
        raise ValueError(
            "a policy that plans by shares of the run does not know the run's length; pass "
            "the number of decisions that will come: esper.Growth(…, max_epochs=…); a callback in "
            "Lightning goes by the Trainer's max_epochs, or its max_steps where data has a length"
        )
    return state.epoch / state.max_epochs
