"""What has grown, carried by a model's own state dict through anyone's checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.slots.slot import SeedSlot
from esper.slots.state_hooks import StateHook, remove_state_hooks
from esper.training.state_tree import tree_as_tensor, tree_from_tensor

KEY = "esper_growth"
"""The state dict's entry: a tensor of bytes, as any checkpoint can hold it."""
FORMAT_VERSION = 4


class CarriedState:
    """Adds what has grown to a model's state dict, and grows it again when that is loaded.

    Frameworks load weights before they ask callbacks, when the seeds that the weights belong to are
    not there yet; so the weights bring along what is needed to build them.

    Args:
        model: Its `state_dict` gets one more entry, and its `load_state_dict` takes it.
        state: Returns what is carried: mappings, lists, plain values and tensors. None carries
            nothing, as before training begins.
        load: Takes it before the weights are loaded, and gives the model the modules for them.

    A model has one: a later one takes the place of an earlier one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        state: Callable[[], Mapping[str, Any] | None],
        load: Callable[[Mapping[str, Any]], None],
    ) -> None:
        remove_state_hooks(model)
        self._model = model
        self._state = state
        self._load = load
        model.register_state_dict_post_hook(StateHook(self._add))
        model.register_load_state_dict_pre_hook(StateHook(self._take))

    def _add(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        carried = self._state() if model is self._model else None
        if carried is not None:
            tree = {"format_version": FORMAT_VERSION, "growth": carried}
            state_dict[prefix + KEY] = tree_as_tensor(tree, KEY)

    def _take(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        carried = state_dict.pop(prefix + KEY, None)
        if model is not self._model:  # a copy has grown what it has
            return
        if carried is not None:
            self._load(_checked(carried))
            return
        orphan = _orphan(model, [name.removeprefix(prefix) for name in state_dict])
        if orphan is not None:
            raise ValueError(
                f"the weights have {orphan!r}, of a seed that is not here, and no {KEY!r} that "
                "tells how to build it; load weights that were saved in training, from one file"
            )


def _orphan(model: nn.Module, names: Iterable[str]) -> str | None:
    """Return the first name of what belongs to a slot and is not in it."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    slots = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, SeedSlot))
    return next((name for name in names if name.startswith(slots) and name not in known), None)


def _checked(carried: Any) -> Mapping[str, Any]:
    if not isinstance(carried, Tensor) or carried.dtype is not torch.uint8:
        raise ValueError(f"{KEY!r} in the weights is no tensor of bytes")
    tree = tree_from_tensor(carried)
    version = tree.get("format_version") if isinstance(tree, Mapping) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{KEY!r} in the weights has format version {version!r}; this esper reads version "
            f"{FORMAT_VERSION}"
        )
    growth: Mapping[str, Any] = tree["growth"]
    return growth
