"""What every sensible policy does with a seed that is already growing."""

from collections.abc import Sequence

from esper.lifecycle.actions import (
    Action,
    Advance,
    Commit,
    GrowthState,
    Operation,
    Prune,
    SlotState,
    legal_operations,
)
from esper.lifecycle.alpha import AlphaMode
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.lifecycle.words import refused_for


def tend(slot: SlotState, *, patience_epochs: int, fade_steps: int) -> Sequence[Action]:
    """Try the next gate; give up on a seed that a gate has refused for too long.

    Args:
        slot: Where the seed grows.
        patience_epochs: Epochs in one stage after which a refused seed is pruned.
        fade_steps: Steps over which a seed in the forward path is faded out.
    """
    if slot.stage not in LIVING_STAGES or slot.fading or slot.alpha_mode is not AlphaMode.HOLD:
        return []
    if slot.refusals_in_stage > 0 and slot.epochs_in_stage >= patience_epochs:
        reason = refused_for(slot.epochs_in_stage, slot.stage)
        return [Prune(slot=slot.path, over_steps=fade_steps, reason=reason)]
    legal = legal_operations(slot)
    if Operation.COMMIT in legal:
        return [Commit(slot=slot.path)]
    return [Advance(slot=slot.path)] if Operation.ADVANCE in legal else []


def asked_to_be_weighed(state: GrowthState) -> Sequence[str]:
    """Return the slots whose next gate may ask what their seed saves.

    All but those whose seed is blending: G3, which it comes to next, asks for none of that. For a
    policy that tries one gate at a time.
    """
    return [slot.path for slot in state.slots if slot.stage is not SeedStage.BLENDING]
