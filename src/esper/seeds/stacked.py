"""Several blocks in one seed: more than one layer of depth behind one module."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.seeds.seed import ContextualSeed, Seed


class _Stack(Seed):
    """What both kinds of stacks are: seeds in the order in which they run."""

    def __init__(self, blocks: Sequence[Seed]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.mixes_tokens = any(block.mixes_tokens for block in blocks)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(layer for block in self._seeds for layer in block.output_layers)

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        return tuple(copy for block in self._seeds for copy in block.copies)

    def prepare(self, shape: tuple[int, ...], device: torch.device) -> None:
        for block in self._seeds:
            block.prepare(shape, device)

    @property
    def _seeds(self) -> list[Any]:
        return list(self.blocks)

    def _compute(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = self._seeds
        total: Tensor = first.increment(features, *args, **kwargs)
        for block in others:
            total = total + block.increment(features + total, *args, **kwargs)
        return total


class StackedSeed(_Stack):
    """Runs seeds one after another, each on the features with what those before it added.

    With increments `f_1 … f_n` the whole increment is the sum `u_n` of

        u_k = u_{k-1} + f_k(x + u_{k-1}),    u_0 = 0

    so nothing is subtracted, and at birth zeros add up to exactly zero.

    Args:
        blocks: In the order in which they run.

    Source: original.
    """

    def increment(self, features: Tensor) -> Tensor:
        return self._compute(features)


class StackedContextualSeed(_Stack, ContextualSeed):
    """A `StackedSeed` of seeds that read the arguments of the call; each is passed the same.

    Args:
        blocks: In the order in which they run.

    Source: original.
    """

    def __init__(self, blocks: Sequence[ContextualSeed]) -> None:
        super().__init__(blocks)

    def increment(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._compute(features, *args, **kwargs)
