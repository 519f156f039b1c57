"""How a slot stands behind a module: one hook, one child, and nothing left when it goes."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments, refuse_cached_tokens
from esper.slots.nested import replace_first
from esper.slots.slot import SeedSlot

SLOT_NAME = "esper_slot"
"""Name under which a slot is registered in the module it stands behind."""


def place(slot: SeedSlot, location: nn.Module) -> None:
    """Put a slot behind a module."""
    slot.train(location.training)
    location.add_module(SLOT_NAME, slot)
    slot.hook_handle = location.register_forward_hook(_through_slot, with_kwargs=True)


def slot_behind(module: nn.Module) -> SeedSlot | None:
    """Return the slot that stands behind this very module."""
    slot = dict(module.named_children()).get(SLOT_NAME)
    return slot if isinstance(slot, SeedSlot) else None


def stands_in(model: nn.Module, slot: SeedSlot) -> bool:
    """Return whether a module of the model runs this slot, behind its own forward."""
    handle = slot.hook_handle
    return handle is not None and any(
        slot_behind(module) is slot and handle.id in module._forward_hooks  # noqa: SLF001 – no public list
        for module in model.modules()
    )


class ForwardHook(NamedTuple):
    """A forward hook, as it was registered."""

    function: Any
    with_kwargs: bool
    always_call: bool


def take_later_hooks(module: nn.Module, slot: SeedSlot) -> list[ForwardHook]:
    """Remove the forward hooks that run after a slot's own, which see its seeds' work."""
    hooks = module._forward_hooks  # noqa: SLF001 – torch has no other way to list them
    with_kwargs = module._forward_hooks_with_kwargs  # noqa: SLF001
    always_called = module._forward_hooks_always_called  # noqa: SLF001
    assert slot.hook_handle is not None
    order = list(hooks)
    later = order[order.index(slot.hook_handle.id) + 1 :]
    return [
        ForwardHook(hooks.pop(key), with_kwargs.pop(key, False), always_called.pop(key, False))
        for key in later
    ]


def remove_slots(model: nn.Module) -> None:
    """Take every slot of a model away, whatever it holds."""
    for module in list(model.modules()):
        slot = slot_behind(module)
        if slot is not None:
            if slot.hook_handle is not None:
                slot.hook_handle.remove()
            delattr(module, SLOT_NAME)


def _through_slot(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook: pass the features through the module's slot.

    Looks the slot up by name, so that a copy of the module runs its own copy of the slot.
    """
    # Not by attribute: the way through Module.__getattr__ is half of a dormant slot's cost.
    slot: Any = module._modules[SLOT_NAME]  # noqa: SLF001
    if not (slot.active or slot.watched):
        return None
    features = output if isinstance(output, Tensor) else output[0]
    if slot.mixes_tokens:
        refuse_cached_tokens(features, args, kwargs)
    call = (
        CallArguments.of_call(args, kwargs, slot.first_parameter)
        if slot.contextual
        else NO_ARGUMENTS
    )
    result = slot(features, call)
    return result if features is output else replace_first(output, result)
