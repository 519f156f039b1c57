"""What of a slot's features a compiled graph depends on."""

from typing import Self

import torch
from torch import Tensor

from esper.lifecycle.record import Record


class FeatureGuards(Record):
    """A tensor's shape and kind, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    """As torch names it: "float32"."""
    device: str
    requires_grad: bool
    autocast: str | None
    """The dtype of autocast around the step; None outside of it."""

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Return what holds for features here, autocast included."""
        device = features.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            shape=tuple(features.shape),
            stride=tuple(features.stride()),
            dtype=dtype_name(features.dtype),
            device=str(features.device),
            requires_grad=features.requires_grad,
            autocast=None if autocast is None else dtype_name(autocast),
        )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None outside of it."""
        return None if self.autocast is None else dtype_named(self.autocast)

    def random(self) -> Tensor:
        """Return standard normal features of this kind, a leaf.

        Effects: consumes the default random stream.
        """
        features = torch.empty_strided(
            self.shape, self.stride, dtype=dtype_named(self.dtype), device=self.device
        )
        return features.normal_().requires_grad_(self.requires_grad)


_FLOATING_POINT = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module's."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the floating-point dtype of a name.

    Raises:
        ValueError: There is none that seeds can compute with.
    """
    if name not in _FLOATING_POINT:
        raise ValueError(
            f"no floating-point dtype to compute with is called {name!r}; "
            f"known: {', '.join(_FLOATING_POINT)}"
        )
    return _FLOATING_POINT[name]
