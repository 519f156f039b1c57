"""A copied block with complex weights, as spectral layers have them, stays complex and learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig
from esper.slots.gradient_health import GradientHealth


class Spectral(nn.Module):
    """A complex weight and a fixed turn per frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.register_buffer("phase", torch.ones(5, dtype=torch.complex64) * 1j)

    def forward(self, features: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(features)
        return torch.fft.irfft(spectrum * self.weight * self.phase, n=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_complex_block_is_copied_whole_and_learns(dtype: torch.dtype, grow: Any) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)
    model = nn.Sequential(first, Spectral(), last)
    inputs = torch.randn(4, 8, dtype=dtype)
    slots = esper.attach(model, "1", example=inputs, config=SlotConfig(isolation="shadowing"))
    slots.gradient_health = GradientHealth(interval_steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    slots.bind(optimizer)
    slot = slots["1"]
    grow(slot, "block", SeedStage.TRAINING, source="own")
    block = slot.seed.block
    assert torch.equal(block.weight, model[1].weight)
    assert torch.equal(block.phase, model[1].phase)
    for _ in range(2):  # the gain is zero in the first
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        slots.tick()
    assert bool((block.weight.imag != model[1].weight.imag).all())
    assert int(slot.nonfinite_steps) == 0
    reading = slots.read_gradient_health(slot)
    assert reading is not None
    assert reading.seed_norm > 0.0
    kept = slots.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    slot.prune()
    slots.load_state_dict(kept[0])
    model.load_state_dict(kept[1])
    assert slot.seed.block.weight.is_complex()
    assert torch.equal(slot.seed.block.weight, block.weight)


@pytest.mark.parametrize("value", [complex(0.0, torch.nan), complex(torch.inf, 0.0)])
@pytest.mark.parametrize("conjugate", [False, True])
def test_a_complex_gradient_that_is_not_finite_becomes_zero(
    value: complex, conjugate: bool, grow: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Spectral())
    inputs = torch.randn(4, 8)
    slots = esper.attach(model, "1", example=inputs, config=SlotConfig(isolation="shadowing"))
    slot = slots["1"]
    grow(slot, "block", SeedStage.TRAINING, source="own")
    weight = slot.seed.block.weight

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.resolve_conj().clone()
        spoilt[3] = value
        return spoilt.conj() if conjugate else spoilt

    weight.register_hook(spoil)
    model(inputs).square().sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    slots.tick()
    assert int(slot.nonfinite_steps) == 1
