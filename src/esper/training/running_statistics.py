"""What a model's forwards keep count of, given back where a step is refused."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.nn.parameter import is_lazy

from esper.slots.modes import without_repeats
from esper.slots.slot_set import SlotSet

_MOST_NUMBERS = 2**20
"""In a buffer that is kept: statistics have a few per channel. What is larger, a table that never
changes or a queue that the loss is taken of, would cost each step a copy."""


class RunningStatistics:
    """Keeps a model's floating-point buffers, each of up to a million numbers, from before a step.

    A forward changes them, as BatchNorm does its running mean, whatever becomes of its step.
    Counts, which are integers, are not kept.

    Args:
        slots: Of the model.
    """

    def __init__(self, slots: SlotSet) -> None:
        self._slots = slots
        self._structure: Hashable = None
        self._places: list[_Place] = []
        self._buffers: list[Tensor] = []
        """In the places, without what `expand` repeats."""
        self._values: list[Tensor] = []
        """Of those, before the step."""

    def keep(self) -> None:
        """Copy them, before a step's first forward. No host–device synchronisation."""
        structure = self._slots.structure()
        if structure != self._structure or not all(place.is_as_it_was() for place in self._places):
            self._find()
            self._structure = structure
        elif self._values:
            with torch.no_grad():
                torch._foreach_copy_(self._values, self._buffers)

    def put_back(self) -> None:
        """Give the model those tensors again, with the values that they had."""
        with torch.no_grad():
            for place, buffer, values in zip(
                self._places, self._buffers, self._values, strict=True
            ):
                if place.buffer.shape != place.shape:  # as observers of quantisation are
                    place.buffer.resize_(place.shape)
                buffer.copy_(values)
                place.own[place.name] = place.buffer

    def _find(self) -> None:
        self._places = [
            _Place(module._buffers, name, buffer, buffer.shape)  # noqa: SLF001 – of each its own
            for module in self._slots.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if _is_statistic(buffer)
        ]
        self._buffers = [without_repeats(place.buffer).detach() for place in self._places]
        self._values = [buffer.clone() for buffer in self._buffers]


class _Place(NamedTuple):
    """Where a buffer is."""

    own: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    shape: Size

    def is_as_it_was(self) -> bool:
        return self.own.get(self.name) is self.buffer and self.buffer.shape == self.shape


def _is_statistic(buffer: Tensor) -> bool:
    if is_lazy(buffer) or not (buffer.is_floating_point() or buffer.is_complex()):
        return False
    return buffer.numel() <= _MOST_NUMBERS
