"""Seeds that must never be committed: useless, lazy and harmful ones, for any family.

Registered for a test or a benchmark only: `with planted(): …`.

Legend: B batch, C channels or D features, last here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.seeds import Family, Seed, blueprints, zero_initialise_

_MEMORY_ROWS = 4096
_HASH_SCALE = 1e4
_FREQUENCY = 50.0
_EXPANSION = 4
_OUTPUT_SIZE = 0.3


class FeatureSeed(Seed):
    """A seed that is written for features in the last dimension, and used for maps as well."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._feature_dim = 1 if family is Family.CNN else -1

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.output,)

    def increment(self, features: Tensor) -> Tensor:
        rows = features.movedim(self._feature_dim, -1)
        return self.of_rows(rows).to(features.dtype).movedim(-1, self._feature_dim)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return the increment for features `B … D`."""
        raise NotImplementedError


class Rescale(FeatureSeed):
    """One learned gain on all features, which any layer around it could take over."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.output = zero_initialise_(nn.LayerNorm(1, bias=False))

    def of_rows(self, rows: Tensor) -> Tensor:
        return rows * self.output.weight


class GainAndShift(FeatureSeed):
    """A learned gain and shift per feature."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.output = zero_initialise_(nn.LayerNorm(dim))

    def of_rows(self, rows: Tensor) -> Tensor:
        return rows * self.output.weight + self.output.bias


class Noise(FeatureSeed):
    """A learned map of fresh noise; it never sees the features."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.output = zero_initialise_(nn.Linear(dim, dim, bias=False))

    def of_rows(self, rows: Tensor) -> Tensor:
        return self.output(torch.randn_like(rows))


class RandomFeatures(FeatureSeed):
    """A learned map of fixed random features, too rough to mean anything on new data."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.register_buffer("directions", _FREQUENCY * torch.randn(dim, _EXPANSION * dim))
        self.output = zero_initialise_(nn.Linear(_EXPANSION * dim, dim, bias=False))

    def of_rows(self, rows: Tensor) -> Tensor:
        return self.output(torch.sin(rows @ self.directions))


class RandomOutput(FeatureSeed):
    """A fixed random function of a fixed size, from the moment its only parameter is not zero."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.register_buffer("expand", torch.randn(dim, _EXPANSION * dim) / dim**0.5)
        contract = torch.randn(_EXPANSION * dim, dim) / (_EXPANSION * dim) ** 0.5
        self.register_buffer("contract", contract)
        self.switch = zero_initialise_(nn.LayerNorm(1, bias=False))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return ()

    def of_rows(self, rows: Tensor) -> Tensor:
        switch = self.switch.weight
        size = (switch.detach() != 0).to(rows.dtype) * _OUTPUT_SIZE
        return (size + switch - switch.detach()) * (torch.tanh(rows @ self.expand) @ self.contract)


class Memory(FeatureSeed):
    """A learned row per hashed input: learns every training sample by heart."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.register_buffer("direction", torch.randn(dim))
        self.output = zero_initialise_(nn.Linear(dim, _MEMORY_ROWS, bias=False))

    def of_rows(self, rows: Tensor) -> Tensor:
        keys = (rows.detach() @ self.direction).abs() * _HASH_SCALE
        return self.output.weight[keys.long() % _MEMORY_ROWS]


class ReversedGradient(FeatureSeed):
    """A perceptron that climbs the loss."""

    def __init__(self, dim: int, family: Family) -> None:
        super().__init__(family)
        self.expand = nn.Linear(dim, 2 * dim)
        self.output = zero_initialise_(nn.Linear(2 * dim, dim))

    def of_rows(self, rows: Tensor) -> Tensor:
        return _Reverse.apply(self.output(torch.relu(self.expand(rows))))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, increment: Tensor) -> Tensor:
        return increment.view_as(increment)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


PLANTED: dict[str, type[FeatureSeed]] = {
    "rescale": Rescale,
    "gain_and_shift": GainAndShift,
    "noise": Noise,
    "random_features": RandomFeatures,
    "random_output": RandomOutput,
    "memory": Memory,
    "reversed_gradient": ReversedGradient,
}
USELESS = ("noop", *PLANTED)
"""Every kind that must never be committed; noop is among the bundled blueprints."""


def _factory(kind: type[FeatureSeed], family: Family) -> Callable[[int], Seed]:
    def build(dim: int) -> Seed:
        return kind(dim, family)

    return build


@contextmanager
def planted() -> Iterator[None]:
    """Register every planted seed for both families inside the block."""
    with blueprints.temporarily():
        for name, kind in PLANTED.items():
            for family in Family:
                blueprints.register(name, family=family)(_factory(kind, family))
        yield
