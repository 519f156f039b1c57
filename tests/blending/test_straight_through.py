"""The straight-through function: forward the host alone, backward to both.

Legend: h host features, u the increment, g the loss gradient at the output.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from esper.blending import DEFAULT_TRUST_FRACTION, proximal_gradient, straight_through
from esper.blending.objectives import SEED_GRADIENTS
from esper.lifecycle import SeedObjective

SHAPES = [(4,), (4, 6), (4, 5, 6), (4, 6, 3, 2)]
BEHIND = [objective for objective in SeedObjective if objective is not SeedObjective.SHADOW]
every_objective = pytest.mark.parametrize("objective", BEHIND)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


def expected_of(objective: SeedObjective, g: Tensor, u: Tensor, h: Tensor, c: float) -> Tensor:
    formula = SEED_GRADIENTS.get(objective)
    return g if formula is None else formula(g, u, h, c)


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


@every_objective
@every_shape
def test_the_increment_receives_what_its_objective_says(
    objective: SeedObjective, shape: tuple[int, ...]
):
    h, u, g = (normal(*shape, seed=seed) for seed in range(3))
    _, _, to_seed = gradients(h, u, g, objective=objective, trust_fraction=0.5)
    assert torch.equal(bits(to_seed), bits(expected_of(objective, g, u, h, 0.5)))
    assert torch.equal(to_seed, g) == (objective is SeedObjective.PLAIN)


def test_the_default_is_proximal_with_the_default_trust_fraction():
    h, u, g = (normal(4, 5, 6, seed=seed) for seed in range(3))
    _, _, to_seed = gradients(h, u, g)
    assert torch.equal(to_seed, proximal_gradient(g, u, h, DEFAULT_TRUST_FRACTION))


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
    expected = expected_of(objective, passed, u, h * weight, DEFAULT_TRUST_FRACTION)
    torch.testing.assert_close(increment.grad, expected)


def test_without_an_overwriting_host_no_copy_is_made():
    features = normal(4, 5, 6).requires_grad_()
    output = straight_through(features, normal(4, 5, 6, seed=1).requires_grad_())
    assert output.data_ptr() == features.data_ptr()


@every_objective
def test_the_seed_is_not_in_the_hosts_second_derivatives(objective: SeedObjective):
    torch.manual_seed(0)
    weight, seed = torch.randn(4, 4), torch.randn(4, 4)

    def curvature(with_seed: bool) -> Tensor:
        host, learned = weight.clone().requires_grad_(), seed.clone().requires_grad_()
        features = torch.tanh(torch.ones(3, 4) @ host)
        if with_seed:
            increment = features.detach() @ learned
            features = straight_through(features, increment, objective=objective)
        parameters = [host, learned] if with_seed else [host]
        first = torch.autograd.grad(features.pow(3).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.sum() for gradient in first), host)[0]

    assert torch.equal(curvature(with_seed=True), curvature(with_seed=False))


@every_objective
def test_it_runs_under_torch_func(objective: SeedObjective):
    torch.manual_seed(0)
    features, increment, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4)

    def loss(features: Tensor, increment: Tensor) -> Tensor:
        return (straight_through(features, increment, objective=objective) * weight).sum()

    of_host, of_seed = torch.func.grad(loss, argnums=(0, 1))(features, increment)
    host, seed = features.clone().requires_grad_(), increment.clone().requires_grad_()
    loss(host, seed).backward()
    assert torch.equal(of_host, host.grad)
    assert torch.equal(of_seed, seed.grad)
    each = torch.func.vmap(torch.func.grad(loss))(features, increment)
    assert torch.equal(each, weight.expand(3, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
@every_objective
@pytest.mark.parametrize("overwritten", [False, True])
def test_forward_derivatives_are_those_without_a_seed(objective: SeedObjective, overwritten: bool):
    features, tangent, increment = (normal(3, 4, seed=seed) for seed in range(3))

    def host(features: Tensor) -> Tensor:
        return features.square()

    def grown(features: Tensor) -> Tensor:
        seed = increment * features.detach()
        options = {"objective": objective, "overwritten": overwritten}
        return host(straight_through(features, seed, **options))

    for derive in (
        lambda f: torch.func.jvp(f, (features,), (tangent,))[1],
        lambda f: torch.func.jacfwd(f)(features),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(features),
        lambda f: _by_dual_numbers(f, features, tangent),
    ):
        assert torch.equal(derive(grown), derive(host))


def _by_dual_numbers(
    function: Callable[[Tensor], Tensor], features: Tensor, tangent: Tensor
) -> Tensor:
    with forward_ad.dual_level():
        derived = function(forward_ad.make_dual(features, tangent))
        return forward_ad.unpack_dual(derived).tangent
