"""When a network grows, apart from what grows in it."""

from collections.abc import Sequence
from typing import Protocol

from esper.lifecycle.actions import GrowthState


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
            state: After an epoch, with the held-out losses so far.
            num_past: Events that have been due before, less than `num_events`.
        """


class FractionTiming:
    """Events at fixed shares of the run.

    Args:
        fractions: Of the decisions of the run, rising.
    """

    reads_losses = False

    def __init__(self, fractions: Sequence[float]) -> None:
        self._fractions = tuple(fractions)

    @property
    def num_events(self) -> int:
        return len(self._fractions)

    def due(self, state: GrowthState, *, num_past: int) -> bool:
        return elapsed_fraction(state) >= self._fractions[num_past]


def elapsed_fraction(state: GrowthState) -> float:
    """Return the share of the run's decisions that have been made, this one included.

    Raises:
        ValueError: It is not known how many there will be.
    """
    if state.max_epochs is None:
        raise ValueError(
            "the schedule policy plans by shares of the run and does not know its length; pass "
            "the number of decisions that will come: esper.Growth(…, max_epochs=…)"
        )
    return state.epoch / state.max_epochs
