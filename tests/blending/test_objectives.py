"""What the increment of a seed behind the host receives, for every objective.

Legend: h host features, u the increment, g the loss gradient at the output, c the trust fraction;
û = u / ‖u‖. The formulas are written out sample by sample below, in Python's own floats:

    PROXIMAL     g + λu, λ = mean‖g‖ / (c · mean‖h‖)
    NORM_CAP     g where ‖u‖ ≤ r = c · mean‖h‖,
                 else g - min(⟨g, û⟩, 0) û + mean‖g‖ min(‖u‖/r - 1, 1) û
    CORRELATION  g - ⟨g, û⟩ û + ‖g‖ min(‖u‖ / (c‖h‖) - 1, 1) û, norms and product over the batch

What follows from them, and is checked: a factor on g comes out as the same factor, so that the loss
scale cancels; and gradient descent on a constant g ends at the sizes that the formulas promise.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.blending import (
    DEFAULT_TRUST_FRACTION,
    capped_gradient,
    correlation_gradient,
    proximal_gradient,
)
from esper.blending.objectives import SEED_GRADIENTS, SeedGradient
from esper.lifecycle import SeedObjective

SHAPES = [(4,), (4, 6), (4, 5, 6), (4, 6, 3, 2)]
SEEDS = st.integers(0, 100)

Vector = list[float]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def norm(vector: Vector) -> float:
    return math.sqrt(sum(x * x for x in vector))


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def samples(tensor: Tensor) -> list[Vector]:
    return [sample.flatten().tolist() for sample in tensor.double()]


def mean_norm(tensor: Tensor) -> float:
    return sum(map(norm, samples(tensor))) / len(tensor)


def proximal_by_hand(g: Tensor, u: Tensor, h: Tensor, c: float) -> Tensor:
    return g + mean_norm(g) / (c * mean_norm(h)) * u


def capped_by_hand(g: Tensor, u: Tensor, h: Tensor, c: float) -> Tensor:
    cap, strength = c * mean_norm(h), mean_norm(g)
    rows = []
    for gradient, increment in zip(samples(g), samples(u), strict=True):
        size = norm(increment)
        unit = [x / size for x in increment]
        back = strength * min(size / cap - 1.0, 1.0) - min(dot(gradient, unit), 0.0)
        along = back if size > cap else 0.0
        rows.append([x + along * y for x, y in zip(gradient, unit, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(g.shape).to(g.dtype)


def correlation_by_hand(g: Tensor, u: Tensor, h: Tensor, c: float) -> Tensor:
    gradient, increment, features = (tensor.double().flatten().tolist() for tensor in (g, u, h))
    size = norm(increment)
    unit = [x / size for x in increment]
    stretch = min(size / (c * norm(features)) - 1.0, 1.0)
    along = norm(gradient) * stretch - dot(gradient, unit)
    values = [x + along * y for x, y in zip(gradient, unit, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(g.shape).to(g.dtype)


BY_HAND: dict[SeedObjective, SeedGradient] = {
    SeedObjective.PROXIMAL: proximal_by_hand,
    SeedObjective.NORM_CAP: capped_by_hand,
    SeedObjective.CORRELATION: correlation_by_hand,
}
every_formula = pytest.mark.parametrize("objective", BY_HAND)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_formula
@every_shape
@given(seed=SEEDS, c=st.floats(0.01, 10.0))
def test_the_gradient_is_the_formula_computed_by_hand(
    objective: SeedObjective, shape: tuple[int, ...], seed: int, c: float
):
    h, u, g = (normal(*shape, seed=seed + index) for index in range(3))
    u[0] *= 0.01  # one sample well within the cap
    received = SEED_GRADIENTS[objective](g, u, h, c)
    torch.testing.assert_close(received, BY_HAND[objective](g, u, h, c), rtol=1e-4, atol=1e-4)


@every_formula
@given(seed=SEEDS, exponent=st.integers(-20, 20))
def test_the_loss_scale_cancels(objective: SeedObjective, seed: int, exponent: int):
    gradient_of = SEED_GRADIENTS[objective]
    h, u, g = (normal(4, 5, 6, seed=seed + index) for index in range(3))
    scale = 2.0**exponent
    scaled = gradient_of(scale * g, u, h, 0.1)
    torch.testing.assert_close(scaled / scale, gradient_of(g, u, h, 0.1))


def settle(gradient_of: SeedGradient, g: Tensor, h: Tensor, c: float) -> Tensor:
    """Follow the gradient with g held, as a host that stands still would hold it."""
    u = torch.zeros_like(g)
    rate = c * mean_norm(h) / mean_norm(g)
    for _ in range(400):
        u = u - 0.1 * rate * gradient_of(g, u, h, c)
    return u


def per_sample(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)


@given(seed=SEEDS, c=st.floats(0.01, 1.0))
def test_a_gradient_that_stays_is_followed_up_to_the_promised_size(seed: int, c: float):
    h, g = normal(4, 30, seed=seed).double(), normal(4, 30, seed=seed + 1).double()

    def direction(tensor: Tensor) -> Tensor:
        return tensor / per_sample(tensor)[:, None]

    proximal = settle(proximal_gradient, g, h, c)
    torch.testing.assert_close(per_sample(proximal).mean(), c * per_sample(h).mean())
    torch.testing.assert_close(proximal / proximal.norm(), -g / g.norm())

    capped = settle(capped_gradient, g, h, c)
    cap = (c * per_sample(h).mean()).expand(4)
    torch.testing.assert_close(per_sample(capped), cap, rtol=0.02, atol=0.0)
    torch.testing.assert_close(direction(capped), -direction(g))

    correlated = settle(correlation_gradient, g, h, c)
    torch.testing.assert_close(correlated.norm(), c * h.norm())
    torch.testing.assert_close(correlated / correlated.norm(), -g / g.norm())


def test_a_gradient_that_leads_back_under_the_cap_is_not_weakened():
    h, u = torch.ones(1, 4), torch.full((1, 4), 2.0)
    inward = u.clone()
    received = capped_gradient(inward, u, h, 0.1)
    assert bool((received >= inward).all())


@every_formula
@every_shape
def test_zeros_make_no_nan_and_a_fresh_seed_receives_g(
    objective: SeedObjective, shape: tuple[int, ...]
):
    gradient_of = SEED_GRADIENTS[objective]
    h, u, g = (normal(*shape, seed=seed) for seed in range(3))
    zero = torch.zeros(shape)
    assert torch.equal(gradient_of(g, zero, h, 0.1), g)
    assert torch.equal(gradient_of(zero, u, h, 0.1), zero)
    assert torch.equal(gradient_of(zero, u, zero, 0.1), zero)
    without_features = gradient_of(g, u, zero, 0.1)
    if objective is SeedObjective.CORRELATION:
        assert abs(float((without_features * u).sum())) < 1e-4
    else:
        assert torch.equal(without_features, g)


@every_formula
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_half_precision_norms_do_not_overflow(
    objective: SeedObjective, dtype: torch.dtype
):
    # 2048 features of 2000 have a norm of 9e4, beyond float16's 65504.
    h = torch.full((2, 2048), 2000.0, dtype=dtype)
    u, g = normal(2, 2048, seed=1, dtype=dtype) * 300, normal(2, 2048, seed=2, dtype=dtype)
    received = SEED_GRADIENTS[objective](g, u, h, DEFAULT_TRUST_FRACTION)
    assert received.dtype is dtype
    expected = BY_HAND[objective](g, u, h, DEFAULT_TRUST_FRACTION)
    torch.testing.assert_close(received, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(received, g)


@every_formula
def test_the_correction_stays_finite_in_half_precision_where_its_factor_would_not(
    objective: SeedObjective,
):
    h = torch.full((2, 3), 1e-3, dtype=torch.float16)
    g = torch.full((2, 3), 1e2, dtype=torch.float16)  # λ is 1e6, beyond float16
    u = torch.full_like(h, 2e-4)
    received = SEED_GRADIENTS[objective](g, u, h, 0.1)
    expected = BY_HAND[objective](g.double(), u.double(), h.double(), 0.1)
    torch.testing.assert_close(received.double(), expected, rtol=2e-3, atol=0.1)


@every_formula
def test_no_argument_is_changed(objective: SeedObjective):
    arguments = [normal(4, 5, 6, seed=seed) for seed in range(3)]
    copies = [tensor.clone() for tensor in arguments]
    SEED_GRADIENTS[objective](*arguments, 0.1)
    assert all(map(torch.equal, arguments, copies))
