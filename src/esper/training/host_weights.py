"""The weights of a host, apart from what grows in it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from esper.slots.slot import SeedSlot

_EXTRA_STATE = "_extra_state"
"""The end of the name under which `nn.Module.get_extra_state` is kept."""


def check_host_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise unless weights are of a host like this one, whatever has grown here or there.

    What a module loads by a way of its own it also judges by itself: an observer's buffers have
    another shape once it has seen a batch, and an extra state is anything.

    Args:
        model: With its slots.
        weights: By their names in the model's state dict, those of slots among them.

    Raises:
        ValueError: A name or a shape is another one.
    """
    slots = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, SeedSlot))
    by_themselves = {n for n, module in model.named_modules() if _loads_by_itself(module)}
    here, then = (
        {name: getattr(value, "shape", None) for name, value in every.items()}
        for every in (model.state_dict(), weights)
    )
    for name in sorted(here.keys() | then.keys()):
        owner, _, last = name.rpartition(".")
        if name.startswith(slots) or owner in by_themselves or last == _EXTRA_STATE:
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


def _loads_by_itself(module: nn.Module) -> bool:
    """Whether a module's class has a loader that is none of torch.nn's, which want equal shapes."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.nn.")  # noqa: SLF001


def _told(shape: Any) -> Any:
    return None if shape is None else tuple(shape)
