"""Operations of kernels that torch 2.13's counter has no formula for, and so would count as none.

All but matrix products counts as none there, and does here. Legend: B batch, T tokens, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

_Shape = Sequence[int]

_ENCODER_LAYER_MASK = 15
"""Place of the mask among what follows the number of heads in `_transformer_encoder_layer_fwd`."""


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which knows of these kernels too."""
    return FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Return the operations of softmax(Q Kᵀ) V; a causal mask saves none, as in torch's formula."""
    batch, heads, queries, head_dim = query
    keys, value_dim = key[2], value[3]
    return 2 * int(batch * heads * queries * keys * (head_dim + value_dim))


def _attention_backward_flops(
    _gradient: Any, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any
) -> int:
    """Return the operations of attention's backward, scores recomputed, as in torch's formula."""
    batch, heads, queries, head_dim = query
    keys, value_dim = key[2], value[3]
    return 2 * int(batch * heads * queries * keys * (3 * head_dim + 2 * value_dim))


def _recurrent_flops(inputs: _Shape, *weights: _Shape) -> int:
    """Return the operations of all steps of recurrent layers.

    Args:
        inputs: Shape `T B D`, or of packed sequences `rows D`.
        weights: Matrices, each applied to every row once, and biases.
    """
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) > 1)


def _mkldnn_layer_flops(inputs: _Shape, first: _Shape, second: _Shape, *_: Any, **__: Any) -> int:
    return _recurrent_flops(inputs, first, second)


def _mkldnn_layer_backward_flops(*args: Any, **_: Any) -> int:
    return 2 * _mkldnn_layer_flops(*args)


def _cudnn_flops(inputs: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    return _recurrent_flops(inputs, *weights)


def _cudnn_backward_flops(*args: Any, **_: Any) -> int:
    return 2 * _cudnn_flops(*args)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Let torch's counter pass tensors, and not their shapes, which nested ones have not."""
    formula._get_raw = True  # type: ignore[attr-defined]  # noqa: SLF001 – how the counter tells
    return formula


@_raw
def _encoder_layer_flops(features: Tensor, dim: int, _num_heads: int, *rest: Any, **_: Any) -> int:
    """Return the operations of `nn.TransformerEncoderLayer`'s fast path."""
    before_mask = rest[:_ENCODER_LAYER_MASK]
    return _tokens_flops(features, dim, [r for r in before_mask if isinstance(r, Tensor)])


@_raw
def _attention_layer_flops(
    query: Tensor, _key: Tensor, _value: Tensor, dim: int, _num_heads: int, *rest: Any, **_: Any
) -> int:
    """Return the operations of `nn.MultiheadAttention`'s fast path, for attention to itself."""
    return _tokens_flops(query, dim, list(rest[:4]))


def _tokens_flops(features: Tensor, dim: int, weights: Sequence[Tensor]) -> int:
    """Return the operations of attention over `B T D` with its matrices and others for each token.

    Args:
        features: May be nested.
        dim: Their D.
        weights: Matrices of which one side is D, and vectors.
    """
    if features.is_nested:
        lengths = [int(rows) for rows, _ in features._nested_tensor_size().tolist()]  # noqa: SLF001 – no public one
    else:
        lengths = [features.shape[1]] * features.shape[0]
    products = sum(lengths) * sum(weight.numel() for weight in weights if weight.ndim == 2)
    scores = sum(length * length for length in lengths) * 2 * dim
    return 2 * (products + scores)


_aten = torch.ops.aten
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,  # noqa: SLF001
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,  # noqa: SLF001
    _aten.mkldnn_rnn_layer: _mkldnn_layer_flops,
    _aten.mkldnn_rnn_layer_backward: _mkldnn_layer_backward_flops,
    _aten._cudnn_rnn: _cudnn_flops,  # noqa: SLF001
    _aten._cudnn_rnn_backward: _cudnn_backward_flops,  # noqa: SLF001
    _aten._transformer_encoder_layer_fwd: _encoder_layer_flops,  # noqa: SLF001
    _aten._native_multi_head_attention: _attention_layer_flops,  # noqa: SLF001
}
