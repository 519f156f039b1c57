"""What a model holds, kept with a run and given back to it."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from esper.slots.sharded import sharded_like
from esper.slots.slot import SeedSlot

_EXTRA_STATE = "_extra_state"
"""The end of the name under which `nn.Module.get_extra_state` is kept."""


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return a model's state dict, copied."""
    return {name: _copied(value) for name, value in model.state_dict().items()}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model back what it held, sharded as it is, once what had grown is there.

    Args:
        model: With its slots.
        state: From `model_state`, as `check_model_state` has found it.
    """
    here = model.state_dict()
    extra = {name: _copied(value) for name, value in state.items() if _is_extra(name)}
    weights = {name: sharded_like(v, here.get(name, v)) for name, v in state.items()}
    model.load_state_dict(weights | extra)


def check_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise unless a state is of a host like this one, whatever has grown here or there.

    What a module loads by a way of its own it also judges by itself: an observer's buffers have
    another shape once it has seen a batch, and an extra state is anything.

    Args:
        model: With its slots.
        state: From `model_state`.

    Raises:
        ValueError: A name or a shape is another one.
    """
    slots = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, SeedSlot))
    by_themselves = {n for n, module in model.named_modules() if _loads_by_itself(module)}
    here, then = (
        {name: getattr(value, "shape", None) for name, value in every.items()}
        for every in (model.state_dict(), state)
    )
    for name in sorted(here.keys() | then.keys()):
        owner = name.rpartition(".")[0]
        if name.startswith(slots) or owner in by_themselves or _is_extra(name):
            continue
        if name not in here or name not in then:
            which = "lacks" if name in then else "has"
            raise ValueError(
                f"the host is not that of the run: it {which} {name!r}; build it as it was then"
            )
        if here[name] != then[name]:
            raise ValueError(
                f"the host is not that of the run: {name!r} has shape {_told(here[name])}, and "
                f"had {_told(then[name])}; build it as it was then"
            )


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _is_extra(name: str) -> bool:
    """Whether a module made it by `get_extra_state`, and takes it over as it likes."""
    return name.rpartition(".")[2] == _EXTRA_STATE


def _loads_by_itself(module: nn.Module) -> bool:
    """Whether a module's class has a loader that is none of torch.nn's, which want equal shapes."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.nn.")  # noqa: SLF001


def _told(shape: Any) -> Any:
    return None if shape is None else tuple(shape)
