"""Operations of kernels for which torch 2.13's counter has no formula, or a wrong one.

All but matrix products counts as none there, and does here: also the gradient of a matrix that met
one vector, which torch computes elementwise. Legend: B batch, T tokens, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from esper.slots.nested import tensors_in

_Shape = Sequence[int]

_ENCODER_LAYER_MASK = 15
"""Place of the mask among what follows the number of heads in `_transformer_encoder_layer_fwd`."""


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which knows of these kernels too.

    On the meta device, where it is asked which blueprints fit, nothing is computed, so that counts
    as none.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))
    counter.flop_registry = {
        operation: _none_on_meta(formula) for operation, formula in counter.flop_registry.items()
    }
    return counter


def _none_on_meta(formula: Callable[..., int]) -> Callable[..., int]:
    """Return a formula, as a counter calls it, that knows of the meta device."""

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        if any(tensor.is_meta for tensor in tensors_in(out_val)):
            return 0
        return formula(*args, out_val=out_val, **kwargs)

    return counted


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


def _matrix_vector_flops(matrix: _Shape, _vector: _Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _batched_product_flops(first: _Shape, second: _Shape, **_: Any) -> int:
    return 2 * prod(first) * second[-1]


def _added(formula: Callable[..., int]) -> Callable[..., int]:
    """Return the formula of a product that is added to something, which stands before it."""

    def of_product(_summand: _Shape, *args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return of_product


def _grouped_product_flops(first: _Shape, second: _Shape, *_: Any, **__: Any) -> int:
    """Return the operations of one product per group, as per expert of its tokens.

    Groups share out a plain matrix's rows or columns, all of which count: how many are past the
    last group only the device knows.
    """
    num_products = first[0] if len(first) == len(second) == 3 else 1
    return 2 * num_products * prod(first[-2:]) * second[-1]


def _trilinear_flops(first: _Shape, second: _Shape, third: _Shape, *settings: Any, **_: Any) -> int:
    """Return the operations of `nn.Bilinear` or of a gradient of it: two at all its indices."""
    sizes: dict[int, int] = {}
    for shape, absent in zip((first, second, third), settings[:3], strict=True):
        axes = [axis for axis in range(len(shape) + len(absent)) if axis not in absent]
        sizes |= zip(axes, shape, strict=True)
    return 2 * prod(sizes.values())


def _convolution_backward_flops(
    gradient: _Shape, inputs: _Shape, weight: _Shape, *settings: Any, **_: Any
) -> int:
    """Return the operations of a convolution's gradients, each as many as the convolution's.

    torch's formula lets the weights' gradient join channels of unlike groups.
    """
    transposed: bool = settings[-4]
    of_inputs, of_weight, _of_bias = settings[-1]
    batch, _channels, *places = inputs if transposed else gradient
    return 2 * batch * prod(places) * prod(weight) * int(of_inputs + of_weight)


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
_BY_NAME: Mapping[str, Callable[..., int]] = {
    "mv": _matrix_vector_flops,
    "addmv": _added(_matrix_vector_flops),
    "addmv_": _added(_matrix_vector_flops),
    "addmm_": _added(_batched_product_flops),
    "baddbmm_": _added(_batched_product_flops),
    "addbmm": _added(_batched_product_flops),
    "addbmm_": _added(_batched_product_flops),
    "_grouped_mm": _grouped_product_flops,
    "_trilinear": _trilinear_flops,
    "convolution_backward": _convolution_backward_flops,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    "mkldnn_rnn_layer": _mkldnn_layer_flops,
    "mkldnn_rnn_layer_backward": _mkldnn_layer_backward_flops,
    "_cudnn_rnn": _cudnn_flops,
    "_cudnn_rnn_backward": _cudnn_backward_flops,
    "_transformer_encoder_layer_fwd": _encoder_layer_flops,
    "_native_multi_head_attention": _attention_layer_flops,
}
_FORMULAS = {
    getattr(_aten, name): formula
    for name, formula in _BY_NAME.items()
    if hasattr(_aten, name)  # an older torch lacks some
}
