"""The seed that does nothing, shared by both families."""

import torch
from torch import Tensor, nn

from esper.seeds.seed import Seed


class NoopSeed(Seed):
    """Adds nothing and has no parameters: a control that a gate must refuse."""

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return ()

    def increment(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)
