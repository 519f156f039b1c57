"""Tensors in nested tuples, lists and mappings, as modules take and return them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the value with every tensor in its tuples, lists and mappings replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """Return the value with every tensor in it on the device, those that are there as they are.

    Does not wait for the copies, which whatever uses them on the device does by itself.
    """
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is, and so its inputs go; CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in the value's tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def replace_first(output: Any, features: Tensor) -> Any:
    """Return a module's output with its features, the tensor or the first element, replaced."""
    if isinstance(output, Tensor):
        return features
    rest = output[1:]
    if hasattr(output, "_fields"):
        return type(output)(features, *rest)
    return type(output)((features, *rest))
