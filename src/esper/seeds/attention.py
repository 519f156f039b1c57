"""The attention core that every attention seed shares.

Legend: B batch, T tokens, D features, H heads, E features per head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from esper.seeds.block_masks import block_masks
from esper.seeds.identity import zero_initialise_

_HEAD_FEATURES = 64
_FEWEST_HEADS = 4
_FLEX_DEVICES = frozenset({"cuda"})
"""Where flex attention has a backward."""
_FEWEST_FLEX_FEATURES = 16
"""Features per head below which torch 2.11 to 2.13 refuses to compile flex attention."""


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Return flex attention for hosts that run eager; uncompiled it holds all scores in memory."""
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def head_count(dim: int, heads: int | None, blueprint: str) -> int:
    """Return the number of heads for width `dim`.

    Args:
        dim: The feature width.
        heads: None takes heads of 64 features where that gives 4 or more, else 4 heads.
        blueprint: Name for the error.

    Raises:
        ValueError: The count is below 1 or does not divide the width.
    """
    if heads is None:
        whole = dim % _HEAD_FEATURES == 0 and dim // _HEAD_FEATURES >= _FEWEST_HEADS
        heads = dim // _HEAD_FEATURES if whole else _FEWEST_HEADS
    if heads < 1 or dim % heads != 0:
        divisors = [count for count in range(1, min(dim, 64) + 1) if dim % count == 0]
        raise ValueError(
            f"{blueprint}: the width {dim} is not divisible by heads={heads}; pass heads= one of "
            f"{', '.join(map(str, divisors))}"
        )
    return heads


class SelfAttention(nn.Module):
    """Multi-head self-attention with an output projection that is zero at birth.

    Args:
        dim: D.
        heads: H, a divisor of D.
        causal: Tokens attend to themselves and to earlier ones only.
        flex: Run as flex attention on a GPU, with heads of 16 features or more; anywhere else
            scaled-dot-product attention runs with the same parameters. Causal only.

    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """

    def __init__(self, dim: int, heads: int, *, causal: bool, flex: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.flex = flex
        self.project_in = nn.Linear(dim, 3 * dim)
        self.project_out = zero_initialise_(nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Return the attended features, shape `B T D`.

        Raises:
            ValueError: The features are not `B T D`.
        """
        if features.ndim != 3:
            raise ValueError(
                f"attention takes features of shape B T D, got {tuple(features.shape)}; put the "
                "slot behind a module whose output has a token dimension"
            )
        batch, tokens, dim = features.shape
        projected = self.project_in(features).view(batch, tokens, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        attended = self._attend(query, key, value)
        output: Tensor = self.project_out(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return output

    def prepare(self, tokens: int, device: torch.device) -> None:
        """Build the block mask that a compiled forward over this many tokens looks up."""
        if self._runs_flex(device):
            block_masks.get_or_make(tokens, device)

    def _apply(self, *args: Any, **kwargs: Any) -> "SelfAttention":
        weight = self.project_in.weight
        before = weight.device, weight.dtype
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        weight = self.project_in.weight
        if self.flex and before != (weight.device, weight.dtype):
            block_masks.clear()
        return self

    def _runs_flex(self, device: torch.device) -> bool:
        large_enough = self.project_in.in_features // self.heads >= _FEWEST_FLEX_FEATURES
        return self.flex and large_enough and device.type in _FLEX_DEVICES

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self._runs_flex(query.device):
            return self._attend_scaled_dot_product(query, key, value)
        tokens, device = query.shape[2], query.device
        if not torch.compiler.is_compiling():
            mask = block_masks.get_or_make(tokens, device)
            attended: Tensor = _compiled_flex_attention()(query, key, value, block_mask=mask)
            return attended
        prepared = block_masks.get(tokens, device)
        if prepared is None:
            return self._attend_scaled_dot_product(query, key, value)
        return attend_flex(query, key, value, prepared)

    def _attend_scaled_dot_product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Return flex attention, shape `B H T E`, under a block mask."""
    attended = flex_attention(query, key, value, block_mask=mask)
    assert isinstance(attended, Tensor)
    return attended
