"""Held-out data: what the gates measure on."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from esper.slots.attach import find_slots
from esper.slots.counterfactual import (
    Variant,
    batch_size,
    call_model,
    check_per_sample,
    fused_losses,
)
from esper.slots.modes import evaluation_mode, sole_device
from esper.slots.nested import to_device
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.telemetry.sink import as_floats
from esper.training.data_position import unchanged_generators

Evaluate = Callable[[], float | Mapping[str, float]]
"""Returns the held-out loss, or metrics with a "loss" among them."""


@runtime_checkable
class VariantEvaluator(Protocol):
    """An evaluation that can also weigh seeds, with the loss of every sample."""

    def __call__(self) -> Mapping[str, float]:
        """Return metrics with a "loss" among them."""

    def variant_losses(
        self, slots: Mapping[str, SeedSlot], variants: Sequence[Variant]
    ) -> Sequence[Tensor]:
        """Return each variant's losses per sample, in the same order of samples at each call."""


class HeldOut:
    """Evaluates a model on fixed batches; counterfactual variants run fused, in one forward each.

    Calling it gives the mean loss and metrics. The model's modes are restored afterwards.

    Args:
        batches: Pairs of inputs and targets, iterated anew at each evaluation, always the same in
            the same order, and moved to the model's device if it has but one. Inputs are a tensor,
            a tuple of arguments or a mapping of keyword arguments. A `generator` that they draw by,
            as a DataLoader's, is put back after each evaluation.
        loss: `(outputs, targets)` to one loss per sample, shape `B`.
        metrics: By name, `(outputs, targets)` to one value per sample, shape `B`; "loss" is taken.
        max_copies: How many variants run in one forward, each on a copy of the batch: what memory
            must have room for when seeds are weighed. More go into further forwards.

    Raises:
        ValueError: `max_copies` is less than 1, or a metric is called "loss".
        TypeError: The batches are one of Python's iterators, which are empty after one evaluation.

    Example:
        >>> import torch, esper
        >>> from torch.nn.functional import cross_entropy
        >>> host = torch.nn.Linear(4, 3)
        >>> batches = [(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))]
        >>> held_out = esper.HeldOut(
        ...     host, batches, loss=lambda out, y: cross_entropy(out, y, reduction="none")
        ... )
        >>> sorted(held_out())
        ['loss']
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Any]],
        *,
        loss: Callable[[Any, Any], Tensor],
        metrics: Mapping[str, Callable[[Any, Any], Tensor]] | None = None,
        max_copies: int = 8,
    ) -> None:
        if max_copies < 1:
            raise ValueError(f"max_copies must be at least 1, got {max_copies}")
        if metrics is not None and "loss" in metrics:
            raise ValueError(
                "metrics must not have a 'loss': that is the one that the gates judge by, passed "
                "as loss=…; give the metric another name"
            )
        kind = type(batches)
        if isinstance(batches, Iterator) and kind.__module__ in ("builtins", "itertools"):
            raise TypeError(
                f"held-out batches are iterated at each evaluation, and a {kind.__name__} is empty "
                "after the first; give a list of them, or what makes them anew, as a DataLoader"
            )
        self.max_copies = max_copies
        self.model = model
        self.batches = batches
        self.loss = loss
        self.metrics = {"loss": loss, **(metrics or {})}

    def __call__(self) -> dict[str, float]:
        """Return the mean over samples of the loss and of every metric. Waits for the device.

        Raises:
            TypeError: A batch is no pair of inputs and targets.
            ValueError: There are no batches, or the loss or a metric is not one value per sample.
        """
        columns: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        # Not in inference mode: a host may keep a table that its longest forward so far has made.
        with evaluation_mode(self.model), torch.no_grad(), unchanged_generators(self.batches):
            for inputs, targets in self._batches_on_device():
                outputs, samples = call_model(self.model, inputs), batch_size(inputs)
                for name, metric in self.metrics.items():
                    values = metric(outputs, targets)
                    check_per_sample(name, values, samples)
                    columns[name].append(values.float())
        return {name: float(torch.cat(values).mean()) for name, values in columns.items()}

    def variant_losses(
        self, slots: Mapping[str, SeedSlot], variants: Sequence[Variant]
    ) -> list[Tensor]:
        """Return each variant's loss per sample over all batches.

        Raises:
            TypeError: As calling it.
            ValueError: As calling it.
        """
        starts = range(0, len(variants), self.max_copies)
        together = [variants[start : start + self.max_copies] for start in starts]
        with evaluation_mode(self.model), unchanged_generators(self.batches):
            parts = [
                torch.cat(
                    [
                        fused_losses(self.model, slots, inputs, targets, self.loss, some)
                        for some in together
                    ]
                )
                for inputs, targets in self._batches_on_device()
            ]
        return list(torch.cat(parts, dim=1).float())

    def _batches_on_device(self) -> Iterator[tuple[Any, Any]]:
        device, found = sole_device(self.model), False
        for batch in self.batches:
            found = True
            check_pair(batch, of="held-out batches")
            inputs, targets = to_device(batch, device)
            yield inputs, targets
        if not found:
            raise ValueError("held-out data has no batches; a growing model needs some to judge by")


def check_evaluates(evaluate: Evaluate, slots: SlotSet) -> None:
    """Raise if an evaluation cannot be called, or is known to be of another model than the slots'.

    Raises:
        TypeError: It is no function.
        ValueError: It is a `HeldOut` of a model without one of the slots.
    """
    if not callable(evaluate):
        raise TypeError(
            f"evaluate must be a function that returns the held-out loss, or a HeldOut, got "
            f"{evaluate!r}"
        )
    if not isinstance(evaluate, HeldOut):
        return
    evaluated = set(find_slots(evaluate.model))
    missing = [slot.path for slot in find_slots(slots.model) if slot not in evaluated]
    if missing:
        raise ValueError(
            f"the HeldOut is of a {type(evaluate.model).__name__} that does not contain slot "
            f"{missing[0]!r}: it is another model than growth's, or a copy or a part of that; give "
            "it growth.slots.model, or a module that contains it"
        )


def check_pair(batch: Any, *, of: str) -> None:
    """Raise TypeError unless a batch is a pair of inputs and targets."""
    several = isinstance(batch, (tuple, list))
    if not (several and len(batch) == 2):
        raise TypeError(
            f"{of} are pairs of inputs and targets, got a {type(batch).__name__}"
            + (f" of {len(batch)}" if several else "")
            + "; inputs may be a tuple of arguments or a mapping of keyword arguments"
        )


def metrics_of(result: float | Mapping[str, float]) -> dict[str, float]:
    """Return an evaluation's result as metrics.

    Raises:
        TypeError: It is neither a number nor a mapping of numbers with a "loss".
    """
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise TypeError(
                f"evaluate returned metrics without a 'loss' ({', '.join(result)}); the gates "
                "judge by it"
            )
        return as_floats(result)
    number: Any = result  # NumPy's numbers are none of Python's
    if isinstance(number, bool) or not isinstance(number, (Real, Tensor)):
        raise TypeError(
            "evaluate must return the held-out loss as a number, or a mapping of metrics with a "
            f"'loss' in it; got {type(number).__name__}"
        )
    return {"loss": float(number)}
