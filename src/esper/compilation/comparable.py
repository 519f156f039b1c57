"""What of the arguments of a call the graphs that were made for it depend on."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from esper.slots.nested import tensors_in

_CONSTANTS = (bool, int, float, str, type(None))


def comparable(value: Any) -> Hashable:
    """Return what is equal for values that one graph is right for.

    Args:
        value: Tensors and constants, in nested tuples, lists and mappings.

    Raises:
        TypeError: Something else is in it, as a sparse tensor, of which a graph cannot be told to
            be right.
    """
    if isinstance(value, Tensor):
        return kind_of(value)
    if isinstance(value, Mapping):
        return tuple((key, comparable(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(comparable(item) for item in value)
    if isinstance(value, _CONSTANTS):
        return type(value), value
    raise TypeError(f"{type(value).__name__} is no tensor and no constant")


def kind_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """Return all of a tensor but its values, its device and where it lies.

    Raises:
        TypeError: It is sparse or nested, which a shape and strides do not describe.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError("a sparse or nested tensor is not described by its shape and strides")
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def repeats_in(value: Any) -> tuple[int, ...]:
    """Return for each tensor in a value which one it is: the place where that comes first."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(t), place) for place, t in enumerate(tensors_in(value)))
