"""The baseline that any policy has to beat."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from esper.lifecycle.actions import (
    Action,
    Advance,
    Commit,
    Germinate,
    GrowthState,
    LegalAction,
    Operation,
    Prune,
    SetAlphaTarget,
    Wait,
    legal_actions,
)
from esper.lifecycle.alpha import AlphaCurve
from esper.policies.tending import asked_to_be_weighed

_TARGETS = (0.5, 1.0)
_RAMP_STEPS = (10, 50, 100)
_FADE_STEPS = (0, 20)


class RandomPolicy:
    """Takes one legal action per decision, uniformly over pairs of operation and slot.

    Args:
        random_seed: Fixes every choice.
    """

    name = "random"
    reads_losses = False

    def __init__(self, random_seed: int = 0) -> None:
        self._random = random.Random(random_seed)

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot whose next gate may ask."""
        return asked_to_be_weighed(state)

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return one legal action."""
        return [self._complete(state, self._random.choice(legal_actions(state)))]

    def state_dict(self) -> dict[str, Any]:
        """Return where its random stream stands."""
        version, numbers, gauss = self._random.getstate()
        return {"version": version, "numbers": list(numbers), "gauss": gauss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._random.setstate((state["version"], tuple(state["numbers"]), state["gauss"]))

    def _complete(self, state: GrowthState, chosen: LegalAction) -> Action:
        choose = self._random.choice
        if chosen.slot is None:
            return Wait()
        slot = state.slot(chosen.slot)
        if chosen.operation is Operation.GERMINATE:
            return Germinate(slot=slot.path, blueprint=choose(slot.choices).name)
        if chosen.operation is Operation.SET_ALPHA_TARGET:
            target, steps = choose(_TARGETS), choose(_RAMP_STEPS)
            curve = choose(list(AlphaCurve))
            return SetAlphaTarget(slot=slot.path, target=target, steps=steps, curve=curve)
        if chosen.operation is Operation.PRUNE:
            return Prune(slot=slot.path, over_steps=choose(_FADE_STEPS), reason="chosen at random")
        if chosen.operation is Operation.COMMIT:
            return Commit(slot=slot.path)
        return Advance(slot=slot.path)
