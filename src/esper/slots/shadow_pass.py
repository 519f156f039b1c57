"""Learning behind the host from the loss itself: a pass at full alpha, beside the step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from esper.slots.modes import beside_the_step
from esper.slots.slot import SeedSlot

_WHERE_IT_RAISED = (
    "raised in a shadow pass, which runs forward and backward once more beside the step for a seed "
    'with SlotConfig(objective="shadow")'
)


def teach_in_shadow(
    slot: SeedSlot, model: nn.Module, slots: Iterable[SeedSlot], loss: Callable[[], Tensor]
) -> None:
    """Add to the living seed's gradients those of the loss at full alpha, the host frozen.

    In the pass the slot returns `h + u` with h detached. Other seeds that train behind the host sit
    it out, and those that blend take part as they do in the step.

    Args:
        slot: Whose seed learns; in train mode.
        model: The slot's.
        slots: All slots of the model.
        loss: Runs the model and returns the loss.

    Effects: `loss` is called once more per step, so module hooks run once more. The host's random
    streams, buffers and `.grad` are left as they were, and the backward computes gradients of
    nothing but the seed's parameters and what lies between them and the loss. The seed draws from
    its own random stream. No host–device synchronisation. A compiled model gets one more graph, in
    place of the one in which other seeds train.
    """
    branch = slot.living
    assert branch is not None
    parameters = [parameter for parameter in branch.parameters() if parameter.requires_grad]
    try:
        with beside_the_step(model, besides=slot), _others_aside(slot, slots), slot.cast_shadow():
            value = loss()
            if value.requires_grad and parameters:
                value.backward(inputs=parameters)
    except Exception as error:
        error.add_note(_WHERE_IT_RAISED)
        raise
    slot.note_shadow_pass()


@contextmanager
def _others_aside(slot: SeedSlot, slots: Iterable[SeedSlot]) -> Iterator[None]:
    with ExitStack() as stack:
        for other in slots:
            if other is not slot:
                stack.enter_context(other.unchanged_stream())
                stack.enter_context(other.sit_out())
        yield
