"""What a compiled graph depends on, as keys: equal keys, equal graphs."""

import hashlib
import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.module_tracker import ModuleTracker

from esper.compilation.parts import Parts
from esper.slots.placement import slot_behind
from esper.slots.slot import SeedSlot

_CONSTANTS = (bool, int, float, str, type(None))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where torch keeps a module's hooks, which it has no public list of."""
_GLOBAL_HOOKS = [getattr(torch_modules, f"_global{kind}") for kind in _HOOKS]
"""The same for hooks of every module."""


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

    Slots, which stand outside of its forward, are left out, and so are hooks.
    """
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
        for name, part in _parts_of(module)
    )


class InnerHooks:
    """The hooks of modules inside of a module, which its graphs contain.

    The compiler does not look whether a module has more of them than the one that it has compiled
    before. The module's own run outside of its forward. Those that torch runs for every module
    count, but for what `FlopCounterMode` follows modules by: nothing runs compiled meanwhile.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._collect()

    def now(self) -> Hashable:
        """Return what is equal, in this process, for modules with the same hooks."""
        if self._parts.changed():
            self._collect()
        if not any(self._places):
            return ()
        return tuple(
            (number, _Same(hook))
            for number, hooks in enumerate(self._places)
            for hook in hooks.values()
            if not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        )

    def _collect(self) -> None:
        self._parts = Parts(part for _, part in _parts_of(self._module))
        inside = [
            getattr(part, kind)
            for part in self._parts.modules
            if part is not self._module
            for kind in _HOOKS
        ]
        self._places = [*_GLOBAL_HOOKS, *inside]


class _Same:
    """Equal for the same object, whatever it takes for equal itself, and keeps it alive."""

    def __init__(self, it: object) -> None:
        self._it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._it is other._it

    def __hash__(self) -> int:
        return id(self._it)


def _parts_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what a module's forward consists of, the module itself first."""
    own = slot_behind(module)
    apart = set() if own is None else set(own.modules())
    return ((name, part) for name, part in module.named_modules() if part not in apart)


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
