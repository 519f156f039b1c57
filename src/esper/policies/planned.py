"""A policy that does what it was told, when it was told."""

from __future__ import annotations  # so that help() says Event, and not all its classes

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, get_args

from esper.lifecycle.actions import Action, Germinate, GrowthState, Wait, check_blueprint
from esper.policies.tending import tend

_ACTIONS: tuple[type, ...] = get_args(get_args(Action)[0])


class PlannedPolicy:
    """Carries out given actions at given epochs, and tends what grows meanwhile.

    For code. The policy called "schedule" on the command line is `GrowthSchedulePolicy`. Without
    actions it begins nothing, and still takes a seed that somebody else has germinated through its
    stages; to decide everything by hand give `Growth` no policy.

    Args:
        actions: By epoch, counted from 1.
        tend_seeds: Also try gates and prune refused seeds, as the heuristic does.
        patience_epochs: Epochs in one stage after which a refused seed is pruned.
        fade_steps: Steps over which a seed in the forward path is faded out.

    Raises:
        TypeError: An epoch is no number of one, or has something else than a list of actions.
        ValueError: An epoch is below 1.
    """

    name = "planned"
    reads_losses = False

    def __init__(
        self,
        actions: Mapping[int, Sequence[Action]],
        *,
        tend_seeds: bool = True,
        patience_epochs: int = 6,
        fade_steps: int = 20,
    ) -> None:
        self._actions = {
            _checked_epoch(epoch): _checked_actions(epoch, planned)
            for epoch, planned in actions.items()
        }
        self._tend_seeds = tend_seeds
        self._patience_epochs = patience_epochs
        self._fade_steps = fade_steps

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot: any gate may be tried."""
        return [slot.path for slot in state.slots]

    def upcoming(self, state: GrowthState) -> Sequence[Germinate]:
        """Return the germinations that are still to come."""
        return [
            action
            for epoch in sorted(self._actions)
            if epoch > state.epoch
            for action in self._actions[epoch]
            if isinstance(action, Germinate)
        ]

    def check(self, state: GrowthState) -> None:
        """Raise if something that is still to come cannot be carried out, as each decision does.

        Raises:
            ValueError: There is no such slot, or a blueprint does not fit its slot; what there is
                is listed.
        """
        for epoch, planned in self._actions.items():
            for action in planned:
                if epoch >= state.epoch and not isinstance(action, Wait):
                    slot = state.slot(action.slot)
                    if isinstance(action, Germinate):
                        check_blueprint(slot, action)

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return this epoch's actions, after those that tend what grows.

        Raises:
            ValueError: As `check`.
        """
        self.check(state)
        planned = self._actions.get(state.epoch, [])
        if not self._tend_seeds:
            return planned
        tending = [
            action
            for slot in state.slots
            for action in tend(
                slot, patience_epochs=self._patience_epochs, fade_steps=self._fade_steps
            )
        ]
        return [*tending, *planned]


def _checked_epoch(epoch: Any) -> int:
    if not isinstance(epoch, Integral):
        raise TypeError(
            f"a plan is a mapping from epochs, counted from 1, to lists of actions, got {epoch!r} "
            "as an epoch"
        )
    if epoch < 1:
        raise ValueError(
            f"a plan's epochs are counted from 1, got {epoch}; 1 is decided after the first epoch"
        )
    return int(epoch)


def _checked_actions(epoch: int, planned: Any) -> list[Action]:
    several = isinstance(planned, Sequence) and not isinstance(planned, str)
    if not several or not all(isinstance(action, _ACTIONS) for action in planned):
        raise TypeError(
            "a plan is a mapping from epochs, counted from 1, to lists of actions, as "
            f"{{{epoch}: [Germinate(slot=…, blueprint=…)]}}, got {planned!r} for epoch {epoch}"
        )
    return list(planned)
