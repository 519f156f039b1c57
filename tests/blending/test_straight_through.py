"""How a seed learns behind the host.

Legend: h host features, u the increment, g the loss gradient at the output, c the trust fraction.

The proximal objective adds the pull λu with λ = mean‖g‖ / (c · mean‖h‖), norms per sample. What
follows from the formula, and is checked: with s > 0,
    λ(s·g, h) = s · λ(g, h), so the direction g + λu does not depend on the loss scale;
    g + λu = 0 at u = -g/λ, whose mean norm is mean‖g‖ / λ = c · mean‖h‖.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.blending import DEFAULT_TRUST_FRACTION, proximal_gradient, straight_through
from esper.lifecycle import SeedObjective

SHAPES = [(4,), (4, 6), (4, 5, 6), (4, 6, 3, 2)]
SEEDS = st.integers(0, 100)
every_objective = pytest.mark.parametrize("objective", SeedObjective)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


def by_hand(g: Tensor, u: Tensor, h: Tensor, c: float) -> Tensor:
    def mean_norm(tensor: Tensor) -> float:
        norms = [math.sqrt(sum(x * x for x in sample.flatten().tolist())) for sample in tensor]
        return sum(norms) / len(norms)

    return g + mean_norm(g) / (c * mean_norm(h)) * u


def gradients(
    features: Tensor, increment: Tensor, incoming: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the gradients of features and increment."""
    features = features.clone().requires_grad_()
    increment = increment.clone().requires_grad_()
    output = straight_through(features, increment, **options)
    output.backward(incoming)
    assert features.grad is not None
    assert increment.grad is not None
    return output.detach(), features.grad, increment.grad


@every_objective
@every_shape
@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize("poison", [None, math.nan, math.inf, -math.inf])
def test_the_host_is_bitwise_alone_forward_and_backward_even_behind_a_broken_seed(
    objective: SeedObjective, shape: tuple[int, ...], overwritten: bool, poison: float | None
):
    features, increment, incoming = (normal(*shape, seed=seed) for seed in range(3))
    if poison is not None:
        increment[1] = poison
    output, to_host, _ = gradients(
        features, increment, incoming, objective=objective, overwritten=overwritten
    )
    assert torch.equal(bits(output), bits(features))
    assert torch.equal(bits(to_host), bits(incoming))


@every_shape
@given(seed=SEEDS, c=st.floats(0.01, 10.0))
def test_the_proximal_gradient_is_the_formula_computed_by_hand(
    shape: tuple[int, ...], seed: int, c: float
):
    h, u, g = (normal(*shape, seed=seed + index) for index in range(3))
    expected = by_hand(g, u, h, c)
    torch.testing.assert_close(proximal_gradient(g, u, h, c), expected)
    _, _, to_seed = gradients(h, u, g, trust_fraction=c)
    torch.testing.assert_close(to_seed, expected)


def test_the_default_is_proximal_with_the_default_trust_fraction():
    h, u, g = (normal(4, 5, 6, seed=seed) for seed in range(3))
    _, _, to_seed = gradients(h, u, g)
    torch.testing.assert_close(to_seed, by_hand(g, u, h, DEFAULT_TRUST_FRACTION))


@every_shape
def test_the_plain_objective_passes_the_gradient_on_as_it_is(shape: tuple[int, ...]):
    h, u, g = (normal(*shape, seed=seed) for seed in range(3))
    _, _, to_seed = gradients(h, u, g, objective=SeedObjective.PLAIN, trust_fraction=0.5)
    assert torch.equal(bits(to_seed), bits(g))


@given(seed=SEEDS, exponent=st.integers(-20, 20))
def test_the_loss_scale_cancels(seed: int, exponent: int):
    h, u, g = (normal(4, 5, 6, seed=seed + index) for index in range(3))
    scale = 2.0**exponent
    scaled = proximal_gradient(scale * g, u, h, 0.1)
    torch.testing.assert_close(scaled / scale, proximal_gradient(g, u, h, 0.1))


@given(seed=SEEDS, c=st.floats(0.01, 1.0))
def test_the_increment_settles_at_the_trusted_fraction_of_the_features(seed: int, c: float):
    h, g = normal(4, 30, seed=seed).double(), normal(4, 30, seed=seed + 1).double()
    zero = torch.zeros_like(g)
    pull = (proximal_gradient(g, torch.ones_like(g), h, c) - g).mean()
    settled = -g / pull
    torch.testing.assert_close(
        proximal_gradient(g, settled, h, c), zero, rtol=0.0, atol=1e-5 * float(g.abs().max())
    )
    sizes = [float(torch.linalg.vector_norm(tensor, dim=1).mean()) for tensor in (settled, h)]
    assert sizes[0] == pytest.approx(c * sizes[1], rel=1e-5)


@every_shape
def test_zero_features_exert_no_pull_and_make_no_nan(shape: tuple[int, ...]):
    u, g = normal(*shape, seed=1), normal(*shape, seed=2)
    zero = torch.zeros(shape)
    assert torch.equal(proximal_gradient(g, u, zero, 0.1), g)
    assert torch.equal(proximal_gradient(zero, u, zero, 0.1), zero)
    assert torch.equal(proximal_gradient(zero, u, normal(*shape), 0.1), zero)
    _, _, to_seed = gradients(zero, u, g)
    assert torch.equal(to_seed, g)


@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_half_precision_norms_do_not_overflow(
    objective: SeedObjective, dtype: torch.dtype
):
    # 2048 features of 2000 have a norm of 9e4, beyond float16's 65504.
    h = torch.full((2, 2048), 2000.0, dtype=dtype)
    u, g = normal(2, 2048, seed=1, dtype=dtype), normal(2, 2048, seed=2, dtype=dtype)
    output, to_host, to_seed = gradients(h, u, g, objective=objective)
    assert {output.dtype, to_host.dtype, to_seed.dtype} == {dtype}
    assert torch.isfinite(to_seed).all()
    if objective is SeedObjective.PROXIMAL:
        expected = by_hand(g.double(), u.double(), h.double(), DEFAULT_TRUST_FRACTION)
        torch.testing.assert_close(to_seed.double(), expected, rtol=0.02, atol=0.02)
        assert not torch.equal(to_seed, g)


@every_objective
def test_a_host_that_overwrites_its_features_hurts_neither_itself_nor_the_seed(
    objective: SeedObjective,
):
    h, u, g = (normal(4, 6, 3, 2, seed=seed) for seed in range(3))
    weight = normal(4, 6, 3, 2, seed=3)
    host, increment = h.clone().requires_grad_(), u.clone().requires_grad_()
    features = host * weight
    output = straight_through(features, increment, objective=objective, overwritten=True)
    output.mul_(2.0).relu_()
    assert torch.equal(features, h * weight)
    output.backward(g)
    passed = torch.where(h * weight > 0, 2.0 * g, torch.zeros_like(g))
    assert torch.equal(output, 2.0 * torch.relu(h * weight))
    torch.testing.assert_close(host.grad, passed * weight)
    pulled = by_hand(passed, u, h * weight, DEFAULT_TRUST_FRACTION)
    expected = pulled if objective is SeedObjective.PROXIMAL else passed
    torch.testing.assert_close(increment.grad, expected)


def test_without_an_overwriting_host_no_copy_is_made():
    features = normal(4, 5, 6).requires_grad_()
    output = straight_through(features, normal(4, 5, 6, seed=1).requires_grad_())
    assert output.data_ptr() == features.data_ptr()


def test_the_pull_stays_finite_in_half_precision_where_its_factor_would_not():
    features = torch.full((2, 3), 1e-3, dtype=torch.float16)
    gradient = torch.full((2, 3), 1e2, dtype=torch.float16)  # λ is 1e6, beyond float16
    zero = torch.zeros_like(features)
    assert torch.equal(proximal_gradient(gradient, zero, features, 0.1), gradient)
    small = torch.full_like(features, 1e-4)
    expected = torch.full_like(gradient, 1e2 + 1e6 * float(small[0, 0]))
    pulled = proximal_gradient(gradient, small, features, 0.1)
    torch.testing.assert_close(pulled, expected, rtol=2e-3, atol=0.0)
