"""Whether features have the batch in their first dimension, as slots take them.

Elsewhere a seed would mix samples, and samples weighed in one batch would not be told apart.

Legend: B batch, T tokens, D features.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.slots.modes import device_of
from esper.slots.nested import map_tensors, tensors_in, to_device
from esper.slots.probe import Features, example_arguments, observe_features

_LAYERS_WITH_BATCH_FIRST = (nn.MultiheadAttention, nn.RNNBase, nn.Transformer)
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)
_LAYERS_WITH_ATTENTION = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def refuse_unless_batch_first(
    model: nn.Module,
    locations: Mapping[str, nn.Module],
    features: Mapping[str, Features],
    example: Any,
) -> None:
    """Raise if features have the batch in another dimension than the first, where that can be told.

    It can be told inside torch's layers that were built with `batch_first=False`, and otherwise by
    which dimension grows when the example does. The example's batch is the first dimension of the
    first tensor in it; of an example that has tokens first, nothing can be told.

    Args:
        model: The host.
        locations: The modules by path.
        features: What came out of them on the example.
        example: As `attach` takes it.

    Raises:
        ValueError: They have.

    Effects: the model runs on the example twice over if features have another dimension as large as
    its batch, and not otherwise.
    """
    for path, observed in features.items():
        if observed.tensor.ndim == 3 and _takes_tokens_first(model, path):
            raise ValueError(_described(path, observed.tensor, dimension=1))
    batch = _batch_size(model, example)
    doubtful = {
        path: locations[path]
        for path, observed in features.items()
        if batch in observed.tensor.shape[1:]
    }
    if batch is None or not doubtful:
        return
    try:
        grown = observe_features(model, doubtful, _twice(model, example, batch))
    except Exception:  # noqa: BLE001 – a host that takes this batch size only; nothing can be told
        return
    for path in doubtful:
        small, large = features[path].tensor, [call.tensor for call in grown[path]]
        if len(large) != 1 or large[0].ndim != small.ndim or len(large[0]) != len(small):
            continue
        for dimension, (before, after) in enumerate(zip(small.shape, large[0].shape, strict=True)):
            if before != after:
                raise ValueError(_described(path, small, dimension=dimension))


def _takes_tokens_first(model: nn.Module, path: str) -> bool:
    """Return whether a module is, or is in, a layer of torch's that works on `T B D`."""
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    for module in around:
        layer = module.layers[0] if isinstance(module, _STACKS) else module
        layer = layer.self_attn if isinstance(layer, _LAYERS_WITH_ATTENTION) else layer
        if isinstance(layer, _LAYERS_WITH_BATCH_FIRST) and not layer.batch_first:
            return True
    return False


def _batch_size(model: nn.Module, example: Any) -> int | None:
    tensors = tensors_in(example_arguments(model, example))
    return next((len(tensor) for tensor in tensors if tensor.ndim), None)


def _twice(model: nn.Module, example: Any, batch: int) -> Any:
    def doubled(tensor: Tensor) -> Tensor:
        batched = tensor.ndim > 0 and len(tensor) == batch
        return torch.cat([tensor, tensor]) if batched else tensor

    return map_tensors(doubled, to_device(example, device_of(model)))


def _described(path: str, features: Tensor, *, dimension: int) -> str:
    return (
        f"module {path!r} returned features of shape {tuple(features.shape)}, where the batch is "
        f"dimension {dimension}; slots take it as the first one, since a seed would mix samples "
        "otherwise: build the host with the batch first (torch's layers take batch_first=True), or "
        "name a module whose features have it first"
    )
