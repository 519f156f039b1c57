"""What the host gave to the module in front of a slot, beyond the features."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.slots.nested import map_tensors, tensors_in


class CallArguments(NamedTuple):
    """Arguments of a call after the first; key-value caches are left out.

    A cache belongs to the host: a copied block would write its own keys into it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "CallArguments":
        """Return what a module was called with, after its first argument."""
        return cls(
            tuple(None if _is_cache(value) else value for value in args[1:]),
            {name: None if _is_cache(value) else value for name, value in kwargs.items()},
        )

    @property
    def has_tensors(self) -> bool:
        """Whether a tensor is among them, which belongs to one batch size."""
        return any(True for _ in tensors_in((self.args, self.kwargs)))

    def detached(self) -> "CallArguments":
        """Return the same with every tensor detached."""
        if not self.args and not self.kwargs:
            return self
        return CallArguments(*map_tensors(Tensor.detach, (self.args, self.kwargs)))

    def to(self, device: torch.device) -> "CallArguments":
        """Return the same with every tensor on a device."""
        return CallArguments(
            *map_tensors(lambda tensor: tensor.to(device), (self.args, self.kwargs))
        )


NO_ARGUMENTS = CallArguments()


def refuse_cached_tokens(
    features: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise if earlier tokens are in a key-value cache instead of in the features.

    Args:
        features: Shape `B T D`, after the module has run.
        args: What the module was called with.
        kwargs: The same.

    Raises:
        RuntimeError: A cache holds more than these T tokens.
    """
    for value in (*args, *kwargs.values()):
        if _is_cache(value) and value.get_seq_length() > features.shape[1]:
            raise RuntimeError(
                "a seed here mixes tokens and would not see those in the key-value cache; turn the "
                "cache off: generate(…, use_cache=False), or use_cache=False in the forward"
            )


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")
