"""What the increment of a seed behind the host receives as its gradient.

Legend: h host features, u the operator's increment, g the loss gradient at the output, c the trust
fraction; all of shape `B …`. Norms are per sample unless they are said to be over the batch.

Each function is pure, keeps no state from step to step, and is linear in the scale of g: a factor
on the loss, GradScaler's for one, comes out as the same factor. Results have the dtype of g; half
precision is reduced in float32.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from esper.lifecycle.learning import SeedObjective

SeedGradient = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From g, u, h and c to what u receives."""


def proximal_gradient(
    gradient: Tensor, increment: Tensor, features: Tensor, trust_fraction: float
) -> Tensor:
    """Return `g + λ u` with `λ = mean‖g‖ / (c · mean‖h‖)`.

    The straight-through gradient is the host's loss linearised at alpha 0; nothing in it answers
    to the size of u, so following it alone grows u without bound. The pull λ u makes each sample's
    optimum `u = -g / λ`, whose norm is c times that of the features: least-squares boosting of u
    toward the negative gradient. λ is 0 where the features are all zero.

    Args:
        gradient: g.
        increment: u.
        features: h.
        trust_fraction: c, above 0.

    Source: original; boosting as in Friedman 2001 (doi 10.1214/aos/1013203451). Measured in
        docs/objective.md.
    """
    pull = _ratio(_sample_norms(gradient).mean(), trust_fraction * _sample_norms(features).mean())
    if gradient.dtype is torch.float16:  # a scaled gradient can make λ alone exceed its range
        return (gradient + increment.float() * pull).to(gradient.dtype)
    return torch.addcmul(gradient, increment, pull.to(gradient.dtype))


def capped_gradient(
    gradient: Tensor, increment: Tensor, features: Tensor, trust_fraction: float
) -> Tensor:
    """Return g where `‖u‖` is below the cap `r = c · mean‖h‖`, and what leads back to it beyond.

    Beyond the cap a sample receives g without the part that would grow u further, and a pull that
    rises with the excess, `mean‖g‖ min(‖u‖ / r - 1, 1)` along u: gradient descent on `⟨g, u⟩`
    projected onto the ball of radius r. The pull is bounded, so that a large step beyond the cap is
    not answered by a larger one back. Where the features are all zero there is no cap.

    Args:
        gradient: g.
        increment: u.
        features: h.
        trust_fraction: c, above 0.

    Source: original; projected gradients as in Goldstein 1964 (doi
        10.1090/S0002-9904-1964-11178-2).
    """
    wide, moved = _widened(gradient), _widened(increment)
    sizes = _sample_norms(moved)
    cap = trust_fraction * _sample_norms(features).mean()
    dims = tuple(range(1, wide.ndim))
    along = (wide * moved).sum(dims) if dims else wide * moved
    excess = _sample_norms(wide).mean() * (_ratio(sizes, cap) - 1.0).clamp(max=1.0)
    correction = _ratio(excess - _ratio(along, sizes).clamp(max=0.0), sizes)
    outside = (sizes > cap) & (cap > 0)
    correction = torch.where(outside, correction, torch.zeros_like(correction))
    correction = correction.reshape(-1, *(1 for _ in dims))
    return torch.addcmul(wide, moved, correction).to(gradient.dtype)


def correlation_gradient(
    gradient: Tensor, increment: Tensor, features: Tensor, trust_fraction: float
) -> Tensor:
    """Return the gradient of `⟨g, u⟩ / ‖u‖` times `‖u‖`, and hold `‖u‖` at `c ‖h‖`.

    With norms and products over the batch and û = u / ‖u‖ that is `g - ⟨g, û⟩ û`, which turns u
    toward -g and says nothing about its size. `‖g‖ min(‖u‖ / (c ‖h‖) - 1, 1) û` keeps the size
    where the line search over amplitudes begins, without which steps of finite length grow u; the
    bound keeps a large step from being answered by a larger one back. A fresh seed, u = 0, receives
    g. Where the features are all zero the size is left alone.

    Args:
        gradient: g.
        increment: u.
        features: h.
        trust_fraction: c, above 0.

    Source: Fahlman and Lebiere 1990, the cascade-correlation architecture: there candidates
        maximise the covariance with the residual error, here the correlation with -g, of which
        that error is the special case of a squared loss; the fixed size is original.
    """
    wide, moved = _widened(gradient), _widened(increment)
    size, gradient_size = torch.linalg.vector_norm(moved), torch.linalg.vector_norm(wide)
    target = trust_fraction * torch.linalg.vector_norm(features, dtype=moved.dtype)
    along = _ratio((wide * moved).sum(), size)
    stretch = (_ratio(size, target) - 1.0).clamp(max=1.0)
    excess = torch.where(target > 0, gradient_size * stretch, target)
    correction = _ratio(excess - along, size)
    return torch.addcmul(wide, moved, correction).to(gradient.dtype)


SEED_GRADIENTS: Mapping[SeedObjective, SeedGradient] = {
    SeedObjective.PROXIMAL: proximal_gradient,
    SeedObjective.NORM_CAP: capped_gradient,
    SeedObjective.CORRELATION: correlation_gradient,
}
"""The objectives that change the gradient on its way to the increment."""


def _sample_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each sample, shape `B`, float32 or wider."""
    dims = tuple(range(1, tensor.ndim))
    dtype = torch.promote_types(tensor.dtype, torch.float32)  # half precision would overflow
    if not dims:
        return tensor.abs().to(dtype)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
    return norms


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
