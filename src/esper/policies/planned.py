"""A policy that does what it was told, when it was told."""

from __future__ import annotations  # so that help() says Event, and not all its classes

from collections.abc import Mapping, Sequence

from esper.lifecycle.actions import Action, Germinate, GrowthState
from esper.policies.tending import tend


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
        self._actions = {epoch: list(planned) for epoch, planned in actions.items()}
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

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return this epoch's actions, after those that tend what grows."""
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
