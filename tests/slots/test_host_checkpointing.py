"""Hosts that recompute their activations: the recomputation's own stop is no seed's failure."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.learning import Isolation

INPUTS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.recompute = False

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                features = checkpoint(layer, features, use_reentrant=False)
            else:
                features = layer(features)
        return features


@pytest.mark.parametrize("blueprint", ["lora", "mlp", "attention", "block"])
@pytest.mark.parametrize(
    "stage",
    [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED],
)
def test_a_seed_survives_recomputation_with_the_same_gradients(
    blueprint: str, stage: SeedStage, grow: Any, randomise: Callable[..., None]
):
    torch.manual_seed(0)
    model = Host()
    config = SlotConfig(isolation=Isolation.SHADOWING)
    slot = esper.attach(model, "layers.1", example=INPUTS, config=config)["layers.1"]
    grow(slot, blueprint, stage)
    randomise(slot.branches)
    if stage is SeedStage.BLENDING:
        slot.set_alpha_target(0.5, 0)
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(INPUTS).square().sum().backward()
        assert slot.tick() == []
        assert slot.stage is stage
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
