"""A SwiGLU seed for Esper, registered when this module is imported."""

import torch.nn.functional as F
from torch import Tensor, nn

from esper import Seed, blueprints
from esper.seeds import zero_initialise_


class SwiGLUSeed(Seed):
    """Adds `down(silu(gate(x)) * up(x))` of the normalised features.

    Source: GLU variants improve transformer (Shazeer 2020, arXiv 2002.05202).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = zero_initialise_(nn.Linear(hidden, dim, bias=False))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.down,)

    def increment(self, features: Tensor) -> Tensor:
        normalised = self.norm(features)
        output: Tensor = self.down(F.silu(self.gate(normalised)) * self.up(normalised))
        return output


@blueprints.register("swiglu", family="transformer")
def swiglu(dim: int, *, expansion: int = 3) -> Seed:
    """Gated two-layer perceptron with SiLU."""
    if expansion < 1:
        raise ValueError(f"swiglu: expansion must be at least 1, got {expansion}")
    return SwiGLUSeed(dim, dim * expansion)
