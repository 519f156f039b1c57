"""What a compiled graph depends on, as keys: equal keys, equal graphs."""

from collections.abc import Hashable

from torch import nn

from esper.slots.placement import slot_behind
from esper.slots.slot import SeedSlot


def structure_of_slot(slot: SeedSlot) -> Hashable:
    """Return what the graphs of a slot's seeds depend on, stage and values apart."""
    config = slot.config
    return (
        slot.family,
        slot.dim,
        config.objective,
        config.trust_fraction,
        slot.layout.overwritten,
        tuple(structure_of_module(branch) for branch in slot.branches),
    )


def structure_of_module(module: nn.Module) -> Hashable:
    """Return what a module's graphs depend on: classes, shapes and dtypes of what it holds.

    Slots, which stand outside of its forward, are left out.
    """
    own = slot_behind(module)
    apart = set() if own is None else set(own.modules())
    return tuple(
        (
            name,
            type(part),
            part.extra_repr(),
            tuple(
                (key, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
                for key, parameter in part.named_parameters(recurse=False)
            ),
        )
        for name, part in module.named_modules()
        if part not in apart
    )
