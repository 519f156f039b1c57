"""Operators: exact identities, dtypes, gradients and the learned gate.

Legend: h host features, f the seed's increment, u the operator's, a alpha; output h + a * u.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.blending import SampleGate, blend, operator_increment
from esper.lifecycle import BlendOperator

SHAPES = [(4, 6), (4, 5, 6), (4, 6, 3, 2)]
ALPHAS = st.floats(0.0, 1.0, width=32)
every_operator = pytest.mark.parametrize("operator", BlendOperator)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def gate_of(batch: int, ndim: int, seed: int = 9) -> Tensor:
    return torch.sigmoid(normal(batch, seed=seed)).reshape(-1, *(1,) * (ndim - 1))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


@every_operator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seed=st.integers(0, 50), scale=st.sampled_from([1e-3, 1.0, 1e30]))
def test_at_alpha_zero_the_features_come_out_bit_for_bit(
    operator: BlendOperator, shape: tuple[int, ...], seed: int, scale: float
):
    features, increment = normal(*shape, seed=seed), scale * normal(*shape, seed=seed + 1)
    u = operator_increment(operator, features, increment, gate_of(4, len(shape)))
    assert torch.equal(bits(blend(features, u, torch.tensor(0.0))), bits(features))
    per_sample = torch.zeros(4, *(1,) * (len(shape) - 1))
    assert torch.equal(bits(blend(features, u, per_sample)), bits(features))


@every_operator
@given(alpha=ALPHAS, seed=st.integers(0, 50))
def test_a_zero_increment_leaves_the_features_bit_for_bit_at_every_alpha(
    operator: BlendOperator, alpha: float, seed: int
):
    features = normal(4, 5, 6, seed=seed)
    u = operator_increment(operator, features, torch.zeros(4, 5, 6), gate_of(4, 3))
    assert torch.count_nonzero(u) == 0
    assert torch.equal(bits(blend(features, u, torch.tensor(alpha))), bits(features))


@given(alpha=ALPHAS, seed=st.integers(0, 50))
def test_operators_follow_their_formulas(alpha: float, seed: int):
    h, f, gate = normal(4, 5, 6, seed=seed), normal(4, 5, 6, seed=seed + 1), gate_of(4, 3)
    expected = {
        BlendOperator.ADD: f,
        BlendOperator.MULTIPLY: h * torch.tanh(f),
        BlendOperator.GATE: gate * f,
    }
    for operator, u in expected.items():
        found = operator_increment(operator, h, f, gate)
        assert torch.equal(found, u)
        torch.testing.assert_close(blend(h, found, torch.tensor(alpha)), h + alpha * u)


def test_alpha_may_differ_from_sample_to_sample():
    h, u = normal(3, 5, 6), normal(3, 5, 6, seed=1)
    alphas = torch.tensor([0.0, 0.5, 1.0])
    together = blend(h, u, alphas.reshape(3, 1, 1))
    for index, alpha in enumerate(alphas):
        assert torch.equal(together[index], blend(h[index], u[index], alpha))


@every_operator
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seed_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_the_hosts_dtype_whatever_the_seed_computed_in(
    operator: BlendOperator, features_dtype: torch.dtype, seed_dtype: torch.dtype
):
    features = normal(4, 5, 6, dtype=features_dtype)
    increment = normal(4, 5, 6, seed=1, dtype=seed_dtype)
    gate = gate_of(4, 3).to(seed_dtype)
    u = operator_increment(operator, features, increment, gate)
    assert (u.dtype, u.shape) == (features_dtype, features.shape)
    output = blend(features, u, torch.tensor(0.5))
    assert (output.dtype, output.shape) == (features_dtype, features.shape)


@given(alpha=ALPHAS, seed=st.integers(0, 50))
def test_the_host_keeps_its_full_gradient_and_the_increment_gets_alpha_of_it(
    alpha: float, seed: int
):
    features = normal(4, 5, 6, seed=seed).requires_grad_()
    increment = normal(4, 5, 6, seed=seed + 1).requires_grad_()
    incoming = normal(4, 5, 6, seed=seed + 2)
    blend(features, increment, torch.tensor(alpha)).backward(incoming)
    assert features.grad is not None
    assert increment.grad is not None
    assert torch.equal(bits(features.grad), bits(incoming))
    torch.testing.assert_close(increment.grad, alpha * incoming)


@pytest.mark.parametrize(
    ("shape", "channels_first"),
    [((4, 6), False), ((4, 6), True), ((4, 5, 6), False), ((4, 6, 3, 2), True)],
)
@given(seed=st.integers(0, 50), scale=st.sampled_from([1e-2, 1.0, 100.0]))
def test_the_gate_is_one_number_in_zero_to_one_per_sample_or_token_and_of_that_alone(
    shape: tuple[int, ...], channels_first: bool, seed: int, scale: float
):
    gate = SampleGate(6, channels_first=channels_first)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(scale * normal(*parameter.shape, seed=seed))
    features = normal(*shape, seed=seed + 1)
    values = gate(features)
    per_token = len(shape) == 3
    assert values.shape == ((4, 5, 1) if per_token else (4, *(1,) * (len(shape) - 1)))
    assert ((values >= 0.0) & (values <= 1.0)).all()
    pooled = features.movedim(1, -1) if channels_first else features
    pooled = pooled.reshape(20, 6) if per_token else pooled.reshape(4, -1, 6).mean(dim=1)
    expected = torch.sigmoid(pooled @ gate.linear.weight[0] + gate.linear.bias)
    torch.testing.assert_close(values.flatten(), expected)
    others = features.clone()
    others[1:] = -7.0
    torch.testing.assert_close(gate(others)[0], values[0])
    if per_token:
        features[:, 1:] = -7.0
        torch.testing.assert_close(gate(features)[:, 0], values[:, 0])


def test_a_fresh_gate_is_half_open_and_its_parameters_are_in_the_state_dict_and_learn():
    gate = SampleGate(6, channels_first=True)
    features = normal(4, 6, 3, 2)
    assert torch.equal(gate(features), torch.full((4, 1, 1, 1), 0.5))
    assert set(gate.state_dict()) == {"linear.weight", "linear.bias"}
    u = operator_increment(BlendOperator.GATE, features, normal(4, 6, 3, 2, seed=1), gate(features))
    (u * normal(4, 6, 3, 2, seed=2)).sum().backward()
    for parameter in gate.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) > 0
