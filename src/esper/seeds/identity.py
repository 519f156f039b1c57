"""The output layer of a seed: zero at birth, rescaled after the amplitude search."""

from typing import TypeVar

import torch
from torch import nn

LayerT = TypeVar("LayerT", bound=nn.Module)


def _affine_parameters(layer: nn.Module) -> list[nn.Parameter]:
    tensors = [getattr(layer, name, None) for name in ("weight", "bias")]
    found = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    if not found:
        raise TypeError(
            f"{type(layer).__name__} has no weight or bias to act on; an output layer is a Conv1d, "
            "Conv2d, Conv3d, Linear, or a norm built with affine parameters"
        )
    return found


def zero_initialise_(layer: LayerT) -> LayerT:
    """Zero weight and bias in place, so that the layer's output is exactly zero.

    Covers Conv1d/2d/3d, Linear and affine norms.

    Returns:
        The same layer, so that a constructor can wrap it.

    Raises:
        TypeError: The layer has neither weight nor bias.
    """
    with torch.no_grad():
        for parameter in _affine_parameters(layer):
            parameter.zero_()
    return layer


def scale_output_(layer: nn.Module, factor: float) -> None:
    """Multiply weight and bias in place by `factor`, which scales the layer's output by it.

    Raises:
        TypeError: The layer has neither weight nor bias.
    """
    with torch.no_grad():
        for parameter in _affine_parameters(layer):
            parameter.mul_(factor)
