"""A copy of one of the host's own blocks as a seed: depth growth."""

from typing import Any

import torch
from torch import Tensor, nn

from esper.seeds.checkpointing import compute
from esper.seeds.graph_free_copy import graph_free_copy
from esper.seeds.identity import zero_initialise_
from esper.seeds.seed import ContextualSeed, Seed
from esper.seeds.stacked import StackedContextualSeed


class FeatureGain(nn.Module):
    """Multiplies each feature by a learned weight, one at first.

    Args:
        dim: Number of features.
        channels_first: Features are dimension 1 rather than the last one.

    Source: LayerScale (Touvron et al. 2021, arXiv 2103.17239).
    """

    def __init__(self, dim: int, *, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, features: Tensor) -> Tensor:
        """Return the scaled features, same shape."""
        if not self.channels_first:
            return features * self.weight
        return features * self.weight.reshape(-1, *(1,) * (features.ndim - 2))


class CopiedBlockSeed(ContextualSeed):
    """Adds `gain * (block(x) - x)`, where the block is a copy of one of the host's modules.

    All weights of the copy are kept; the gain per feature, zero at birth, makes the seed the
    identity whatever the block computes. At gain 1 the seed is the block itself.

    BatchNorm in the copy normalises by the statistics that it was copied with, so that a seed
    holds no state that a step changes. Its in-place activations act out of place.

    Args:
        block: The copy; it is changed as described.
        dim: Number of features.
        channels_first: Features are dimension 1 rather than the last one.
        checkpointing: Recompute the block's activations in the backward.

    Source: original; copy-stacking as in G_stack (Du et al. 2024, arXiv 2405.15319), made lossless
        by the gain.
    """

    mixes_tokens = True

    def __init__(
        self, block: nn.Module, dim: int, *, channels_first: bool, checkpointing: bool
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.block = block
        self.gain = zero_initialise_(FeatureGain(dim, channels_first=channels_first))
        for module in block.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        self.train(self.training)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.gain,)

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        return (self.block,)

    def train(self, mode: bool = True) -> "CopiedBlockSeed":
        """Set the mode; norms that keep running statistics stay in eval mode."""
        super().train(mode)
        for module in self.block.modules():
            if getattr(module, "track_running_stats", False):
                module.eval()
        return self

    def increment(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return compute(
            self._compute,
            features,
            *args,
            owner=self,
            checkpointing=self.checkpointing,
            **kwargs,
        )

    def _compute(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.block(features, *args, **kwargs)
        if isinstance(output, (tuple, list)):
            output = output[0]
        if output.shape != features.shape:
            raise ValueError(
                f"the copied block maps features of shape {tuple(features.shape)} to "
                f"{tuple(output.shape)}; it must keep the shape"
            )
        difference: Tensor = self.gain(output - features)
        return difference


def copied_blocks(
    source: object,
    dim: int,
    *,
    blueprint: str,
    depth: int,
    channels_first: bool,
    checkpointing: bool,
) -> Seed:
    """Return a seed of `depth` copies of one module, each with a gain of its own.

    Args:
        source: The module; the first copy is itself.
        dim: Number of features.
        blueprint: Name for the error.
        depth: How many copies run one after another.
        channels_first: Features are dimension 1 rather than the last one.
        checkpointing: Recompute each block's activations in the backward.

    Raises:
        TypeError: The source is no module, a path say.
    """
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"{blueprint}: source must be a module to take over here, got {source!r}; a slot's "
            "germinate(…, source='path') looks paths up in its host and copies the module"
        )
    blocks = [
        CopiedBlockSeed(block, dim, channels_first=channels_first, checkpointing=checkpointing)
        for block in (source, *(copy_module(source) for _ in range(depth - 1)))
    ]
    return blocks[0] if depth == 1 else StackedContextualSeed(blocks)


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy in no graph; it shares the configs of transformers' modules.

    The host's switches, of the attention that it uses, say, reach a copy through its config.
    """
    configs = {id(config): config for config in map(_config_of, module.modules())}
    return graph_free_copy(module, configs)


def _config_of(module: nn.Module) -> Any:
    """Return what a module of transformers is configured by; None for other modules."""
    return None if isinstance(config := getattr(module, "config", None), nn.Module) else config
