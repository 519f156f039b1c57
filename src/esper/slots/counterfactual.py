"""What would the loss be with other alphas: many variants in one forward."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from esper.lifecycle.stages import SeedStage
from esper.slots.nested import map_tensors, tensors_in
from esper.slots.slot import SeedSlot

Variant = Mapping[str, float]
"""Alpha by slot path; a slot that a variant does not name keeps its own."""


def effective_alpha(slot: SeedSlot) -> float:
    """Return the weight that the living seed has in an eval forward now."""
    return 1.0 if slot.stage is SeedStage.PROBATIONARY else slot.alpha


def fused_losses(
    model: nn.Module,
    slots: Mapping[str, SeedSlot],
    inputs: Any,
    targets: Any,
    loss: Callable[[Any, Any], Tensor],
    variants: Sequence[Variant],
) -> Tensor:
    """Return every sample's loss under every variant, from one forward.

    The batch is repeated once per variant and each slot gets its alpha per sample, so the result
    equals separate runs up to the rounding of larger batches.

    Args:
        model: In eval mode.
        slots: By path, as `esper.attach` returns them.
        inputs: A tensor, or a tuple, list or mapping of tensors, batch first.
        targets: As `inputs`.
        loss: Returns one value per sample, shape `B`.
        variants: Alphas by slot path, V of them.

    Returns:
        Shape `V B`.

    Raises:
        RuntimeError: The model is in train mode.
        ValueError: A variant names a slot without a trained seed, or `loss` returned another shape.
    """
    batch = batch_size(inputs)
    count = len(variants)
    paths = sorted({path for variant in variants for path in variant})
    with ExitStack() as stack, torch.inference_mode():
        for path in paths:
            slot = slots[path]
            own = effective_alpha(slot)
            alphas = torch.tensor([variant.get(path, own) for variant in variants])
            stack.enter_context(slot.force_alpha(alphas.repeat_interleave(batch)))
        outputs = call_model(model, _repeat(inputs, batch, count))
        losses = loss(outputs, _repeat(targets, batch, count))
    if losses.shape != (count * batch,):
        raise ValueError(
            f"loss must return one value per sample, shape ({count * batch},), got "
            f"{tuple(losses.shape)}; use reduction='none'"
        )
    return losses.reshape(count, batch)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def batch_size(inputs: Any) -> int:
    """Return the first dimension of the first tensor that has one.

    Raises:
        TypeError: There is no tensor.
    """
    for tensor in tensors_in(inputs):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise TypeError(f"found no batched tensor in {type(inputs).__name__}")


def _repeat(value: Any, batch: int, count: int) -> Any:
    def repeat(tensor: Tensor) -> Tensor:
        batched = tensor.ndim > 0 and tensor.shape[0] == batch
        return torch.cat([tensor] * count) if batched else tensor

    return map_tensors(repeat, value)
