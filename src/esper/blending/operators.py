"""Operators: how a seed's increment `f` becomes the term `u` that alpha scales.

Legend: h host features, f the seed's increment, u the operator's, a alpha; output h + a * u.
"""

import torch
from torch import Tensor, nn

from esper.lifecycle.alpha import BlendOperator


class SampleGate(nn.Module):
    """A learned gate in [0, 1] per sample, or per token where there are tokens; half open at birth.

    gate = sigmoid(linear(x)) with the linear map zero at birth, where x is a map's mean over its
    pixels, or a token's own features: a mean over tokens would let each see later ones.

    Effects: its construction consumes the default random stream; slots wrap this in a forked one.
    """

    def __init__(self, dim: int, *, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.linear = nn.Linear(dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the gate, shape `B 1 … 1`, or `B … 1` with features in the last dimension."""
        if not self.channels_first:
            return torch.sigmoid(self.linear(features))
        dims = tuple(range(2, features.ndim))
        pooled = features.mean(dim=dims) if dims else features
        gate = torch.sigmoid(self.linear(pooled))
        return gate.reshape(-1, *(1 for _ in range(features.ndim - 1)))


def operator_increment(
    operator: BlendOperator, features: Tensor, seed_increment: Tensor, gate: Tensor | None
) -> Tensor:
    """Return `u` for the host features h and the seed's increment f.

    ADD: f. MULTIPLY: h * tanh(f). GATE: gate * f.

    Args:
        operator: Which formula.
        features: h, shape `B … C …` or `B … D`.
        seed_increment: f, shape of `features`.
        gate: Per sample or token, broadcastable to `features`; needed by GATE only.

    Returns:
        Shape and dtype of `features`, whatever the seed computed in.
    """
    if operator is BlendOperator.MULTIPLY:
        return features * torch.tanh(seed_increment).to(features.dtype)
    if operator is BlendOperator.GATE:
        assert gate is not None
        return (gate * seed_increment).to(features.dtype)
    if seed_increment.dtype == features.dtype:  # in a step a call that does nothing takes 20 µs
        return seed_increment
    return seed_increment.to(features.dtype)


def blend(features: Tensor, increment: Tensor, alpha: Tensor) -> Tensor:
    """Return `features + alpha * increment`; at alpha 0 this is `features` exactly.

    The gradient to `features` through the first term is 1 at every alpha, unlike a lerp's
    `1 - alpha`.

    Args:
        features: h, any shape.
        increment: u, same shape and dtype as `features`.
        alpha: 0-dim, or per sample and broadcastable; no tensor is made of one that has the dtype
            of `features`. In another one it would take the result along, under CUDA's autocast.

    Returns:
        Shape and dtype of `features`.
    """
    return torch.addcmul(features, increment, alpha.to(features.dtype))
