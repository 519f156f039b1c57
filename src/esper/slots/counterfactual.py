"""What would the loss be with other alphas: many variants in one forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper.lifecycle.stages import SeedStage
from esper.seeds.registry import Family
from esper.slots.attach import find_slots
from esper.slots.linear_imitation import ImitationFit, LinearImitation
from esper.slots.nested import leaves_in, map_tensors, tensors_in
from esper.slots.slot import SeedSlot


@dataclass(frozen=True)
class Imitated:
    """An imitation of the seed's increment in place of the seed's own."""

    alpha: float
    by: LinearImitation


Variant = Mapping[str, float | Imitated]
"""Alpha by slot path, of the seed or of its imitation; a slot that is not named keeps its own."""


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
    equals separate runs up to the rounding of larger batches; each variant's loss is computed by
    itself. The runs are separate where copies of the batch would meet: inputs, outputs or features
    have not one row per sample, as edges of a graph or in a host that folds tokens or windows into
    the batch, outputs hold anything else than tensors, as a distribution, or a norm takes its
    statistics from the batch in eval mode too. So they are where the forward raises, or a seed in
    it. A model whose samples meet in another way, as by attention over the batch, cannot be told.

    A single variant runs once, whatever the model is: `fitting_imitations` counts each sample.

    Args:
        model: In eval mode.
        slots: By path, as `esper.attach` returns them.
        inputs: A tensor, or a tuple, list or mapping of tensors, batch first.
        targets: Of the loss.
        loss: Returns one value per sample, shape `B`.
        variants: Alphas by slot path, V of them.

    Returns:
        Shape `V B`.

    Raises:
        RuntimeError: The model is in train mode.
        ValueError: A variant names a slot without a trained seed, or `loss` returned another shape.
    """
    batch = batch_size(inputs)
    paths = sorted({path for variant in variants for path in variant})
    own = {path: effective_alpha(slots[path]) for path in paths}
    choices = {path: [variant.get(path, own[path]) for variant in variants] for path in paths}
    weighed = [(slots[path], chosen) for path, chosen in choices.items()]
    with torch.no_grad():  # no inference mode: a host may keep a table that its largest batch made
        together = None
        if len(variants) > 1 and _are_apart(model, inputs, batch):
            together = _outputs_together(model, inputs, weighed, batch, len(variants))
        losses = []
        for number in range(len(variants)):
            if together is None:
                outputs = _outputs_alone(model, inputs, weighed, number)
            else:
                outputs = together[number]
            losses.append(loss(outputs, targets))
            check_per_sample("loss", losses[-1], batch)
        return torch.stack(losses)


_Weighed = Sequence[tuple[SeedSlot, Sequence[float | Imitated]]]
"""Slots with what each variant weighs there."""


def _are_apart(model: nn.Module, inputs: Any, batch: int) -> bool:
    """Whether copies of a batch behind one another are as they are alone, as far as is known."""
    if any(t.ndim > 0 and t.shape[0] not in (1, batch) for t in tensors_in(inputs)):
        return False
    return not any(
        isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()
    )


def _outputs_together(
    model: nn.Module, inputs: Any, weighed: _Weighed, batch: int, count: int
) -> list[Any] | None:
    """Return each variant's outputs from one forward; None where that cannot be had."""
    intact = [slot for slot in find_slots(model) if not slot.failed]
    with ExitStack() as stack:
        for slot, chosen in weighed:
            stack.enter_context(_weigh_each(slot, chosen, copies=batch))
        try:
            outputs = call_model(model, _repeat(inputs, batch, count))
        except Exception:  # noqa: BLE001 – alone it may run, with a mask for so many rows, or tells itself
            outputs = None
    # A seed may have room for the batch, and none for so many: what it raises alone counts.
    raised = [slot for slot in intact if slot.withhold_failure() is not None]
    if raised or not _hold_rows(outputs, count * batch):
        return None

    def of_variant(number: int) -> Any:
        return map_tensors(lambda t: t[number * batch : (number + 1) * batch], outputs)

    return [of_variant(number) for number in range(count)]


def _hold_rows(outputs: Any, rows: int) -> bool:
    """Whether outputs are tensors of so many rows each, and nothing that could be of all rows."""
    leaves = [leaf for leaf in leaves_in(outputs) if not isinstance(leaf, (str, NoneType))]
    return bool(leaves) and all(
        isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and leaf.ndim > 0
        and leaf.shape[0] == rows
        for leaf in leaves
    )


def _outputs_alone(model: nn.Module, inputs: Any, weighed: _Weighed, number: int) -> Any:
    """Return one variant's outputs from a forward of its own."""
    with ExitStack() as stack:
        for slot, chosen in weighed:
            stack.enter_context(weigh(slot, chosen[number]))
        return call_model(model, inputs)


def check_per_sample(name: str, values: Tensor, samples: int) -> None:
    """Raise if values of a loss or a metric are not one per sample.

    Raises:
        ValueError: They have another shape than `(samples,)`.
    """
    if values.shape != (samples,):
        raise ValueError(
            f"{name} must return one value per sample, shape ({samples},), got "
            f"{tuple(values.shape)}; use reduction='none', and take the mean over what is left"
        )


@contextmanager
def weigh(slot: SeedSlot, choice: float | Imitated) -> Iterator[None]:
    """Run a slot's seed, or an imitation of it, at one alpha for all samples."""
    alpha = choice.alpha if isinstance(choice, Imitated) else choice
    with ExitStack() as stack:
        stack.enter_context(slot.force_alpha(alpha))
        if isinstance(choice, Imitated):
            stack.enter_context(slot.measure_as(_Mixture(choice.by, torch.tensor([True]))))
        yield


@contextmanager
def _weigh_each(
    slot: SeedSlot, choices: Sequence[float | Imitated], *, copies: int
) -> Iterator[None]:
    """Run a slot's seed, or its imitation, at several alphas, `copies` samples of each."""
    alphas = [choice.alpha if isinstance(choice, Imitated) else choice for choice in choices]
    imitations = [choice.by for choice in choices if isinstance(choice, Imitated)]
    with ExitStack() as stack:
        stack.enter_context(slot.force_alpha(torch.tensor(alphas).repeat_interleave(copies)))
        if imitations:
            if any(other is not imitations[0] for other in imitations):
                raise ValueError(
                    f"slot {slot.path!r}: variants of one forward must share an imitation; measure "
                    "others in a forward of their own"
                )
            pairs = zip(choices, alphas, strict=True)  # of alpha 0 the slot runs no sample
            where = torch.tensor([isinstance(choice, Imitated) for choice, alpha in pairs if alpha])
            mixture = _Mixture(imitations[0], where.repeat_interleave(copies))
            stack.enter_context(slot.measure_as(mixture))
        yield


class _Mixture:
    """Takes an imitation for some samples, and the seed's increment for the others."""

    def __init__(self, by: LinearImitation, where: Tensor) -> None:
        self._by = by
        self._where = where.to(by.weight.device)

    def __call__(self, features: Tensor, increment: Tensor) -> Tensor:
        samples = self._where.reshape(-1, *(1,) * (features.ndim - 1))
        return torch.where(samples, self._by(features), increment)


@contextmanager
def fitting_imitations(slots: Mapping[str, SeedSlot]) -> Iterator[Mapping[str, ImitationFit]]:
    """Collect what imitates each slot's seed, from every forward inside in which alpha is forced.

    Args:
        slots: By path; each holds a living seed.
    """
    fits = {}
    with ExitStack() as stack:
        for path, slot in slots.items():
            fit = ImitationFit(
                slot.dim,
                feature_dim=1 if slot.family is Family.CNN else -1,
                device=slot.blend_alpha.device,
            )
            stack.enter_context(slot.measure_as(fit))
            fits[path] = fit
        yield fits


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
