"""The seed that does nothing, shared by both families."""

import torch
from torch import Tensor

from esper.seeds.seed import Seed


class NoopSeed(Seed):
    """Adds nothing and has no parameters: a control that a gate must refuse."""

    @property
    def output_layer(self) -> None:
        return None

    def increment(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)
