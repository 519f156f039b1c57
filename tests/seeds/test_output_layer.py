"""Zeroing and scaling of output layers, and group counts for any width."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.seeds import group_count, group_norm, scale_output_, zero_initialise_

LAYERS = [
    (nn.Conv1d(3, 4, 3), (2, 3, 7)),
    (nn.Conv2d(3, 4, 3), (2, 3, 7, 7)),
    (nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5)),
    (nn.Conv2d(3, 4, 1, bias=False), (2, 3, 5, 5)),
    (nn.Linear(3, 4), (2, 3)),
    (nn.Linear(3, 4, bias=False), (2, 5, 3)),
    (nn.GroupNorm(1, 3), (2, 3, 4, 4)),
    (nn.LayerNorm(3), (2, 5, 3)),
]
every_layer = pytest.mark.parametrize(
    ("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS]
)


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@every_layer
def test_a_zeroed_layer_gives_exactly_zero_and_can_still_learn(
    layer: nn.Module, shape: tuple[int, ...]
):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.count_nonzero(randomised(layer)(features)) > 0
    assert zero_initialise_(layer) is layer
    output = layer(features)
    assert torch.count_nonzero(output) == 0
    (
        output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    ).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@every_layer
def test_scaling_the_layer_scales_its_output(layer: nn.Module, shape: tuple[int, ...]):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = randomised(layer)(features)
    scale_output_(layer, -0.25)
    torch.testing.assert_close(layer(features), -0.25 * before)
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.GroupNorm(1, 3, affine=False), nn.LayerNorm(3, elementwise_affine=False)],
    ids=["ReLU", "GroupNorm", "LayerNorm"],
)
def test_a_layer_without_affine_parameters_is_refused(layer: nn.Module):
    for act in (zero_initialise_, lambda other: scale_output_(other, 2.0)):
        with pytest.raises(TypeError, match=f"{type(layer).__name__} has no weight or bias"):
            act(layer)


@given(channels=st.integers(1, 3000), at_most=st.integers(1, 64))
def test_the_group_count_is_the_largest_allowed_divisor(channels: int, at_most: int):
    count = group_count(channels, at_most=at_most)
    divisors = [number for number in range(1, at_most + 1) if channels % number == 0]
    assert count == max(n for n in divisors if channels // n >= 2 or n == 1)


def test_group_norm_takes_any_width_and_refuses_none():
    for channels in (1, 3, 8, 12, 17):
        norm = group_norm(channels)
        assert (norm.num_groups, norm.num_channels) == (group_count(channels), channels)
    for channels, at_most in ((0, 8), (-3, 8), (8, 0)):
        with pytest.raises(ValueError, match=f"channels={channels}, at_most={at_most}"):
            group_count(channels, at_most=at_most)
