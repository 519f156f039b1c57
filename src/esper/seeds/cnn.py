"""Blueprints for channels-first maps, `B C H W`.

Legend: B batch, C channels (`dim`), H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.seeds.checkpointing import compute
from esper.seeds.copied_block import copied_blocks
from esper.seeds.identity import zero_initialise_
from esper.seeds.noop import NoopSeed
from esper.seeds.normalization import group_norm
from esper.seeds.registry import Family, blueprints
from esper.seeds.seed import Seed
from esper.seeds.stacked import StackedSeed

_BLOCK_KERNEL_SIZE = 7
_BLOCK_EXPANSION = 4


def _hidden(dim: int, reduction: int, blueprint: str) -> int:
    if reduction < 1:
        raise ValueError(f"{blueprint}: reduction must be at least 1, got {reduction}")
    return max(min(dim, 2), dim // reduction)  # a norm over one channel of one pixel fails


class NormSeed(Seed):
    """Adds a GroupNorm of the features with learned scale and shift, both zero at birth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = zero_initialise_(group_norm(dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.norm,)

    def increment(self, features: Tensor) -> Tensor:
        output: Tensor = self.norm(features)
        return output


class SqueezeExcitationSeed(Seed):
    """Rescales channels by `1 + tanh(z)`, where z comes from the pooled features.

    Source: squeeze-and-excitation (Hu et al. 2018, arXiv 1709.01507), reparameterised so that the
    scale is exactly 1 at birth; the original's sigmoid never is.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(dim, hidden)
        self.excite = zero_initialise_(nn.Linear(hidden, dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.excite,)

    def increment(self, features: Tensor) -> Tensor:
        pooled = features.mean(dim=(2, 3))
        scale = torch.tanh(self.excite(F.relu(self.squeeze(pooled))))
        return features * scale[:, :, None, None]


class ConvSeed(Seed):
    """A stack of convolutions with GroupNorm and ReLU between, the last one zero at birth."""

    def __init__(self, layers: list[nn.Conv2d], *, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.convolutions = nn.ModuleList(layers)
        self.norms = nn.ModuleList(group_norm(layer.out_channels) for layer in layers[:-1])
        zero_initialise_(layers[-1])

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self._last,)

    @property
    def _last(self) -> nn.Module:
        return self.convolutions[len(self.convolutions) - 1]

    def increment(self, features: Tensor) -> Tensor:
        return compute(self._compute, features, owner=self, checkpointing=self.checkpointing)

    def _compute(self, features: Tensor) -> Tensor:
        hidden = features
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            hidden = F.relu(norm(convolution(hidden)))
        output: Tensor = self._last(hidden)
        return output


class ConvNeXtBlockSeed(Seed):
    """A residual block: depthwise convolution, norm over all features, perceptron with GELU.

    Source: ConvNeXt (Liu et al. 2022, arXiv 2201.03545), with the norm over a sample's whole map
        and a zero-initialised last layer in place of LayerScale.
    """

    def __init__(self, depthwise: nn.Conv2d, hidden: int, *, checkpointing: bool) -> None:
        super().__init__()
        dim = depthwise.out_channels
        self.checkpointing = checkpointing
        self.depthwise = depthwise
        self.norm = group_norm(dim, at_most=1)
        self.expand = nn.Conv2d(dim, hidden, 1)
        self.contract = zero_initialise_(nn.Conv2d(hidden, dim, 1))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.contract,)

    def increment(self, features: Tensor) -> Tensor:
        return compute(self._compute, features, owner=self, checkpointing=self.checkpointing)

    def _compute(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.expand(self.norm(self.depthwise(features))))
        output: Tensor = self.contract(hidden)
        return output


def _conv(inputs: int, outputs: int, kernel_size: int, *, groups: int = 1) -> nn.Conv2d:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and positive to keep the map's size, got {kernel_size}"
        )
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, groups=groups)


@blueprints.register("noop", family=Family.CNN, linear=True)
def _noop(dim: int) -> Seed:  # noqa: ARG001 - every factory takes the width
    """Nothing: a control that a gate must refuse."""
    return NoopSeed()


@blueprints.register("norm", family=Family.CNN, linear=True)
def _norm(dim: int) -> Seed:
    """GroupNorm with learned scale and shift."""
    return NormSeed(dim)


@blueprints.register("attention", family=Family.CNN)
def _attention(dim: int, *, reduction: int = 4) -> Seed:
    """Channel attention (squeeze-and-excitation)."""
    return SqueezeExcitationSeed(dim, _hidden(dim, reduction, "attention"))


@blueprints.register("depthwise", family=Family.CNN)
def _depthwise(dim: int, *, kernel_size: int = 3, checkpointing: bool = False) -> Seed:
    """Depthwise convolution, then a pointwise one."""
    layers = [_conv(dim, dim, kernel_size, groups=dim), _conv(dim, dim, 1)]
    return ConvSeed(layers, checkpointing=checkpointing)


@blueprints.register("bottleneck", family=Family.CNN)
def _bottleneck(
    dim: int, *, reduction: int = 4, kernel_size: int = 3, checkpointing: bool = False
) -> Seed:
    """Pointwise reduction, convolution, pointwise expansion."""
    hidden = _hidden(dim, reduction, "bottleneck")
    layers = [_conv(dim, hidden, 1), _conv(hidden, hidden, kernel_size), _conv(hidden, dim, 1)]
    return ConvSeed(layers, checkpointing=checkpointing)


@blueprints.register("conv_small", family=Family.CNN)
def _conv_small(dim: int, *, kernel_size: int = 3, checkpointing: bool = False) -> Seed:
    """Convolution to half the channels, then a pointwise one."""
    hidden = _hidden(dim, 2, "conv_small")
    layers = [_conv(dim, hidden, kernel_size), _conv(hidden, dim, 1)]
    return ConvSeed(layers, checkpointing=checkpointing)


@blueprints.register("conv_light", family=Family.CNN)
def _conv_light(dim: int, *, kernel_size: int = 3, checkpointing: bool = False) -> Seed:
    """Convolution, then a pointwise one."""
    layers = [_conv(dim, dim, kernel_size), _conv(dim, dim, 1)]
    return ConvSeed(layers, checkpointing=checkpointing)


@blueprints.register("conv_heavy", family=Family.CNN)
def _conv_heavy(dim: int, *, kernel_size: int = 3, checkpointing: bool = False) -> Seed:
    """Two full convolutions."""
    layers = [_conv(dim, dim, kernel_size), _conv(dim, dim, kernel_size)]
    return ConvSeed(layers, checkpointing=checkpointing)


@blueprints.register("block", family=Family.CNN)
def _block(
    dim: int,
    *,
    source: nn.Module | None = None,
    depth: int = 1,
    kernel_size: int = _BLOCK_KERNEL_SIZE,
    expansion: int = _BLOCK_EXPANSION,
    checkpointing: bool = False,
) -> Seed:
    """Whole residual blocks, fresh or copied from the host's module at `source`."""
    if depth < 1:
        raise ValueError(f"block: depth must be at least 1, got {depth}")
    if source is not None:
        if kernel_size != _BLOCK_KERNEL_SIZE or expansion != _BLOCK_EXPANSION:
            raise ValueError("block: a copy takes kernel_size and expansion from its source")
        return copied_blocks(
            source,
            dim,
            blueprint="block",
            depth=depth,
            channels_first=True,
            checkpointing=checkpointing,
        )
    if expansion < 1:
        raise ValueError(f"block: expansion must be at least 1, got {expansion}")

    def fresh() -> Seed:
        depthwise = _conv(dim, dim, kernel_size, groups=dim)
        return ConvNeXtBlockSeed(depthwise, dim * expansion, checkpointing=checkpointing)

    return fresh() if depth == 1 else StackedSeed([fresh() for _ in range(depth)])
