"""How a seed learns behind the host: forward the host alone, backward to both.

Legend: h host features, u the operator's increment, g the loss gradient at the output.
"""

from typing import Any

import torch
from torch import Tensor

from esper.lifecycle.learning import SeedObjective

DEFAULT_TRUST_FRACTION = 0.1
"""c of the proximal objective: the size of u, relative to h, that it settles at."""


def _mean_sample_norm(tensor: Tensor) -> Tensor:
    dims = tuple(range(1, tensor.ndim))
    dtype = torch.promote_types(tensor.dtype, torch.float32)  # half precision would overflow
    if not dims:
        return tensor.abs().to(dtype).mean()
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
    return norms.mean()


def proximal_gradient(
    gradient: Tensor, increment: Tensor, features: Tensor, trust_fraction: float
) -> Tensor:
    """Return `g + λ u` with `λ = mean‖g‖ / (c · mean‖h‖)`, norms per sample over the batch.

    The straight-through gradient is the host's loss linearised at alpha 0; nothing in it answers
    to the size of u, so following it alone grows u without bound. The pull λ u makes each sample's
    optimum `u = -g / λ`, whose norm is c times that of the features: least-squares boosting of u
    toward the negative gradient. λ is scale-free in the loss (a GradScaler's factor cancels), and
    0 where the features are all zero.

    Args:
        gradient: g, shape `B …`.
        increment: u, same shape.
        features: h, same shape.
        trust_fraction: c, above 0.

    Source: original; boosting as in Friedman 2001 (doi 10.1214/aos/1013203451). Measured in
        docs/objective.md.
    """
    scale = trust_fraction * _mean_sample_norm(features)
    pull = torch.where(scale > 0, _mean_sample_norm(gradient) / scale, torch.zeros_like(scale))
    if gradient.dtype is torch.float16:  # a scaled gradient can make λ alone exceed its range
        return (gradient + increment.float() * pull).to(gradient.dtype)
    return torch.addcmul(gradient, increment, pull.to(gradient.dtype))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        increment: Tensor,
        trust_fraction: float | None,
        overwritten: bool,
    ) -> Tensor:
        ctx.trust_fraction = trust_fraction
        if trust_fraction is not None:
            ctx.save_for_backward(features, increment)
        return features.clone() if overwritten else features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        if ctx.trust_fraction is None:
            return gradient, gradient, None, None
        features, increment = ctx.saved_tensors
        pulled = proximal_gradient(gradient, increment, features, ctx.trust_fraction)
        return gradient, pulled, None, None


def straight_through(
    features: Tensor,
    increment: Tensor,
    *,
    objective: SeedObjective = SeedObjective.PROXIMAL,
    trust_fraction: float = DEFAULT_TRUST_FRACTION,
    overwritten: bool = False,
) -> Tensor:
    """Return the host features themselves, and give the increment a gradient too.

    The host's gradient is the incoming one, bit for bit; an inf or NaN in the increment reaches
    neither the output nor that gradient.

    Args:
        features: h, any shape.
        increment: u, same shape and dtype as `features`.
        objective: Whether the increment's gradient is pulled toward zero increments.
        trust_fraction: c of the PROXIMAL objective; PLAIN passes the gradient on as it is.
        overwritten: The caller changes the output in place, which the seed's own backward must not
            see: the output is a copy.
    """
    pull = trust_fraction if objective is SeedObjective.PROXIMAL else None
    output: Tensor = _StraightThrough.apply(features, increment, pull, overwritten)  # type: ignore[no-untyped-call]
    return output
