"""Blueprints for features in the last dimension, `B D` or `B T D`.

Legend: B batch, T tokens, D features (`dim`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.seeds.attention import SelfAttention, head_count
from esper.seeds.checkpointing import compute
from esper.seeds.copied_block import copied_blocks
from esper.seeds.identity import zero_initialise_
from esper.seeds.noop import NoopSeed
from esper.seeds.registry import Family, blueprints
from esper.seeds.seed import Seed
from esper.seeds.stacked import StackedSeed

_BLOCK_EXPANSION = 4


class NormSeed(Seed):
    """Adds a LayerNorm of the features with learned scale and shift, both zero at birth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = zero_initialise_(nn.LayerNorm(dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.norm,)

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
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.up,)

    def linear_map(self) -> Tensor:
        return self.up.weight @ self.down.weight

    def increment(self, features: Tensor) -> Tensor:
        output: Tensor = self.up(self.down(features))
        return output


class MLPSeed(Seed):
    """Adds a pre-normalised two-layer perceptron with GELU."""

    def __init__(self, dim: int, hidden: int, *, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = zero_initialise_(nn.Linear(hidden, dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.contract,)

    def increment(self, features: Tensor) -> Tensor:
        return compute(self._compute, features, owner=self, checkpointing=self.checkpointing)

    def _compute(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.expand(self.norm(features)))
        output: Tensor = self.contract(hidden)
        return output


class AttentionSeed(Seed):
    """Adds pre-normalised self-attention."""

    mixes_tokens = True

    def __init__(self, dim: int, attention: SelfAttention, *, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm = nn.LayerNorm(dim)
        self.attention = attention

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.attention.project_out,)

    def prepare(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.attention.prepare(shape[1], device)

    def increment(self, features: Tensor) -> Tensor:
        return compute(self._compute, features, owner=self, checkpointing=self.checkpointing)

    def _compute(self, features: Tensor) -> Tensor:
        output: Tensor = self.attention(self.norm(features))
        return output


class TransformerBlockSeed(Seed):
    """A pre-normalised transformer block: self-attention, then a perceptron with GELU.

    Both output projections are zero at birth.

    Source: GPT-2 (Radford et al. 2019) for the layout; zero-initialised output projections make
    depth growth lossless (Shen et al. 2022, Staged Training, arXiv 2203.06211, among others).
    """

    mixes_tokens = True

    def __init__(
        self, dim: int, hidden: int, attention: SelfAttention, *, checkpointing: bool
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = zero_initialise_(nn.Linear(hidden, dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.attention.project_out, self.contract)

    def increment(self, features: Tensor) -> Tensor:
        return compute(self._compute, features, owner=self, checkpointing=self.checkpointing)

    def _compute(self, features: Tensor) -> Tensor:
        attended: Tensor = self.attention(self.attention_norm(features))
        hidden = F.gelu(self.expand(self.mlp_norm(features + attended)))
        output: Tensor = attended + self.contract(hidden)
        return output


def _at_least_one(value: int, option: str, blueprint: str) -> int:
    if value < 1:
        raise ValueError(f"{blueprint}: {option} must be at least 1, got {value}")
    return value


@blueprints.register("noop", family=Family.TRANSFORMER, linear=True)
def _noop(dim: int) -> Seed:  # noqa: ARG001 - every factory takes the width
    """Nothing: a control that a gate must refuse."""
    return NoopSeed()


@blueprints.register("norm", family=Family.TRANSFORMER, linear=True)
def _norm(dim: int) -> Seed:
    """LayerNorm with learned scale and shift."""
    return NormSeed(dim)


@blueprints.register("lora", family=Family.TRANSFORMER, linear=True)
def _lora(dim: int, *, rank: int = 8) -> Seed:
    """Low-rank linear map."""
    return LoRASeed(dim, _at_least_one(rank, "rank", "lora"))


@blueprints.register("lora_large", family=Family.TRANSFORMER, linear=True)
def _lora_large(dim: int, *, rank: int = 32) -> Seed:
    """Low-rank linear map of a higher rank."""
    return LoRASeed(dim, _at_least_one(rank, "rank", "lora_large"))


@blueprints.register("attention", family=Family.TRANSFORMER)
def _attention(
    dim: int, *, heads: int | None = None, causal: bool = True, checkpointing: bool = False
) -> Seed:
    """Self-attention; causal unless told otherwise, so that it cannot look ahead."""
    count = head_count(dim, heads, "attention")
    attention = SelfAttention(dim, count, causal=causal)
    return AttentionSeed(dim, attention, checkpointing=checkpointing)


@blueprints.register("flex_attention", family=Family.TRANSFORMER)
def _flex_attention(dim: int, *, heads: int | None = None, checkpointing: bool = False) -> Seed:
    """Causal self-attention as flex attention on a GPU, as SDPA elsewhere."""
    count = head_count(dim, heads, "flex_attention")
    attention = SelfAttention(dim, count, causal=True, flex=True)
    return AttentionSeed(dim, attention, checkpointing=checkpointing)


@blueprints.register("mlp_small", family=Family.TRANSFORMER)
def _mlp_small(dim: int, *, expansion: int = 1, checkpointing: bool = False) -> Seed:
    """Two-layer perceptron with GELU, no wider than the features."""
    hidden = dim * _at_least_one(expansion, "expansion", "mlp_small")
    return MLPSeed(dim, hidden, checkpointing=checkpointing)


@blueprints.register("mlp", family=Family.TRANSFORMER)
def _mlp(dim: int, *, expansion: int = 4, checkpointing: bool = False) -> Seed:
    """Two-layer perceptron with GELU."""
    hidden = dim * _at_least_one(expansion, "expansion", "mlp")
    return MLPSeed(dim, hidden, checkpointing=checkpointing)


@blueprints.register("block", family=Family.TRANSFORMER)
def _block(
    dim: int,
    *,
    source: nn.Module | None = None,
    depth: int = 1,
    heads: int | None = None,
    expansion: int = _BLOCK_EXPANSION,
    causal: bool = True,
    checkpointing: bool = False,
) -> Seed:
    """Whole transformer blocks, fresh or copied from the host's module at `source`."""
    _at_least_one(depth, "depth", "block")
    if source is not None:
        if heads is not None or expansion != _BLOCK_EXPANSION or not causal:
            raise ValueError("block: a copy takes heads, expansion and causal from its source")
        return copied_blocks(
            source,
            dim,
            blueprint="block",
            depth=depth,
            channels_first=False,
            checkpointing=checkpointing,
        )
    hidden = dim * _at_least_one(expansion, "expansion", "block")
    count = head_count(dim, heads, "block")

    def fresh() -> Seed:
        attention = SelfAttention(dim, count, causal=causal)
        return TransformerBlockSeed(dim, hidden, attention, checkpointing=checkpointing)

    return fresh() if depth == 1 else StackedSeed([fresh() for _ in range(depth)])
