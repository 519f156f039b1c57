"""Blueprints for features in the last dimension, `B D` or `B T D`.

Legend: B batch, T tokens, D features (`dim`).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from esper.seeds.identity import zero_initialise_
from esper.seeds.noop import NoopSeed
from esper.seeds.registry import Family, blueprints
from esper.seeds.seed import Seed


class NormSeed(Seed):
    """Adds a LayerNorm of the features with learned scale and shift, both zero at birth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = zero_initialise_(nn.LayerNorm(dim))

    @property
    def output_layer(self) -> nn.Module:
        return self.norm

    def increment(self, features: Tensor) -> Tensor:
        output: Tensor = self.norm(features)
        return output


class LoRASeed(Seed):
    """Adds a low-rank linear map `up(down(x))`.

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685); acts on a module's output instead of beside
    its weight.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = zero_initialise_(nn.Linear(rank, dim, bias=False))

    @property
    def output_layer(self) -> nn.Module:
        return self.up

    def increment(self, features: Tensor) -> Tensor:
        output: Tensor = self.up(self.down(features))
        return output


class MLPSeed(Seed):
    """Adds a pre-normalised two-layer perceptron with GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = zero_initialise_(nn.Linear(hidden, dim))

    @property
    def output_layer(self) -> nn.Module:
        return self.contract

    def increment(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.expand(self.norm(features)))
        output: Tensor = self.contract(hidden)
        return output


@blueprints.register("noop", family=Family.TRANSFORMER)
def _noop(dim: int) -> Seed:  # noqa: ARG001 - every factory takes the width
    """Nothing: a control that a gate must refuse."""
    return NoopSeed()


@blueprints.register("norm", family=Family.TRANSFORMER)
def _norm(dim: int) -> Seed:
    """LayerNorm with learned scale and shift."""
    return NormSeed(dim)


@blueprints.register("lora", family=Family.TRANSFORMER)
def _lora(dim: int, *, rank: int = 8) -> Seed:
    """Low-rank linear map."""
    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, got {rank}")
    return LoRASeed(dim, rank)


@blueprints.register("mlp", family=Family.TRANSFORMER)
def _mlp(dim: int, *, expansion: int = 4) -> Seed:
    """Two-layer perceptron with GELU."""
    if expansion < 1:
        raise ValueError(f"mlp: expansion must be at least 1, got {expansion}")
    return MLPSeed(dim, dim * expansion)
