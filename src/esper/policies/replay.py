"""A policy that grows what another run grew, at times of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper.lifecycle.actions import (
    Action,
    Germinate,
    GrowthState,
    Operation,
    legal_operations,
)
from esper.lifecycle.stages import LIVING_STAGES
from esper.policies.tending import asked_to_be_weighed, tend


class ReplayPolicy:
    """Germinates given seeds, each once its epoch has come and its slot is free, and tends them.

    One that is pruned is tried again as soon as its slot is free.

    Args:
        plan: Pairs of epoch and seed, in the order in which a slot takes its seeds.
        last_epoch: The last one in which anything germinates; None for all of them.
        patience_epochs: Epochs in one stage after which a refused seed is pruned.
        fade_steps: Steps over which a seed in the forward path is faded out.
    """

    name = "replay"
    reads_losses = False

    def __init__(
        self,
        plan: Sequence[tuple[int, Germinate]],
        *,
        last_epoch: int | None = None,
        patience_epochs: int,
        fade_steps: int,
    ) -> None:
        self.waiting = list(plan)
        """What has not germinated yet, or was pruned."""
        self._growing: dict[str, tuple[int, Germinate]] = {}
        """By slot, what germinated there last and how many seeds were committed before."""
        self._last_epoch = last_epoch
        self._patience_epochs = patience_epochs
        self._fade_steps = fade_steps

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot whose next gate may ask."""
        return asked_to_be_weighed(state)

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return what tends the growing seeds, then the germinations that are due."""
        actions: list[Action] = []
        for slot in state.slots:
            actions += tend(
                slot, patience_epochs=self._patience_epochs, fade_steps=self._fade_steps
            )
        self._put_back(state)
        if self._last_epoch is not None and state.epoch > self._last_epoch:
            return actions
        taken: set[str] = set()
        later: list[tuple[int, Germinate]] = []
        for epoch, germinate in self.waiting:
            slot = state.slot(germinate.slot)
            free = slot.path not in taken and Operation.GERMINATE in legal_operations(slot)
            if epoch <= state.epoch and free:
                actions.append(germinate)
                self._growing[slot.path] = (slot.committed, germinate)
            else:
                later.append((epoch, germinate))
            taken.add(slot.path)
        self.waiting = later
        return actions

    def state_dict(self) -> dict[str, Any]:
        """Return what waits, and what grows."""
        return {
            "waiting": [[epoch, seed.model_dump(mode="json")] for epoch, seed in self.waiting],
            "growing": {
                path: [committed, seed.model_dump(mode="json")]
                for path, (committed, seed) in self._growing.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.waiting = [(epoch, Germinate.from_dump(seed)) for epoch, seed in state["waiting"]]
        self._growing = {
            path: (committed, Germinate.from_dump(seed))
            for path, (committed, seed) in state["growing"].items()
        }

    def _put_back(self, state: GrowthState) -> None:
        """Let what was pruned wait again, before all else."""
        for path, (committed, germinate) in list(self._growing.items()):
            slot = state.slot(path)
            if slot.stage in LIVING_STAGES:
                continue
            del self._growing[path]
            if slot.committed == committed:
                self.waiting.insert(0, (state.epoch, germinate))
