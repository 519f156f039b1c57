"""What a compiled graph depends on, as keys: equal keys, equal graphs."""

import hashlib
import inspect
from collections.abc import Hashable
from functools import cache
from pathlib import Path

from torch import nn

from esper.slots.placement import slot_behind
from esper.slots.slot import SeedSlot

_CONSTANTS = (bool, int, float, str, type(None))


def structure_of_slot(slot: SeedSlot) -> Hashable:
    """Return what the graphs of a slot's seeds depend on, stage and tensors' values apart."""
    config = slot.config
    branches = [slot.branch(index) for index in range(len(slot.branches))]
    return (
        slot.family,
        slot.dim,
        config.objective,
        config.trust_fraction,
        slot.layout.overwritten,
        tuple(
            (
                branch.blueprint,
                repr(sorted(branch.options.items(), key=repr)),
                branch.blend_operator,
                structure_of_module(branch),
                _constants_of(branch),
            )
            for branch in branches
        ),
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


def code_of_module(module: nn.Module) -> str:
    """Return a digest of the files in which a module's classes, and their bases, are written.

    So the functions beside a class count, and those that a file imports do not: where they have
    changed, the run finds no graph in an equal request's artefact, and waits for the compiler. A
    class without a file, made in a shell, counts by its name.
    """
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    text = "\n".join(
        sorted(f"{kind.__module__}.{kind.__qualname__} {_file(kind)}" for kind in classes)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _constants_of(module: nn.Module) -> Hashable:
    """Return the plain values that modules hold, by which their code may branch."""
    return tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, _CONSTANTS) and not key.startswith("_") and key != "training"
    )


@cache
def _file(kind: type) -> str:
    """Return a digest of the file that a class is written in; empty where there is none."""
    try:
        written = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(written).hexdigest()
