"""Hooks on a model's state dict that are for this model alone."""

from collections.abc import Callable
from typing import Any, Self

from torch import nn


class StateHook:
    """Hooks a model's state dict; a copy of the model shares it instead of copying what it holds.

    Args:
        call: What the hook does.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def remove_state_hooks(module: nn.Module) -> None:
    """Remove those of a module itself; it may be a copy of the one that they are for."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):  # noqa: SLF001 – no public list
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "hook", hook), StateHook):  # torch wraps those of loading
                del hooks[key]
