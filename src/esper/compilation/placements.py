"""Where a model's tensors lie, which a captured graph reads and writes."""

from collections import OrderedDict
from itertools import chain, count
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from esper.compilation.parts import Parts

_LEARNS = attrgetter("requires_grad")


class Placements:
    """Tells whether a model has the parameters and buffers that it had, and where they were.

    Whether they learn counts, too. The tensors of the placements that are known are kept alive: so
    one that comes to lie where another has been is not taken for it.

    Args:
        model: Whose they are.
        max_placements: How many are known; the one that was met the longest ago is forgotten.
    """

    def __init__(self, model: nn.Module, *, max_placements: int) -> None:
        self._model = model
        self._max_placements = max_placements
        self._tensors: list[Tensor | None] = []
        self._strided: list[Tensor] = []
        self._placed: list[int] = []
        self._numbers: OrderedDict[tuple[int, ...], tuple[int, list[Tensor | None]]] = OrderedDict()
        self._next = count()
        self._number = next(self._next)
        self._collect()

    def number(self) -> int:
        """Return what is equal for equal placements; it does not wait for the device."""
        if self._parts.changed() or any(self._without):
            self._collect()
        tensors = [*chain.from_iterable(map(dict.values, self._with))]
        # By identity: another tensor may have the same memory, and to compare values is to wait.
        others = len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors))
        if others:
            self._tensors = tensors
            self._strided = [t for t in tensors if t is not None and t.layout is torch.strided]
        placed = [*map(Tensor.data_ptr, self._strided), *map(_LEARNS, self._strided)]
        if others or placed != self._placed:
            self._placed = placed
            self._number = self._numbered()
        return self._number

    def names(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return what `give_back` takes: which tensor has which name now."""
        return [(place, dict(place)) for place in (*self._with, *self._without)]

    def give_back(self, names: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Assign to names the tensors that they had."""
        for place, tensors in names:
            place.clear()
            place.update(tensors)

    def _collect(self) -> None:
        self._parts = Parts(self._model.modules())
        places: list[dict[str, Any]] = [
            place
            for part in self._parts.modules
            for place in (part._parameters, part._buffers)  # noqa: SLF001 – no public place
        ]
        self._with = [place for place in places if place]
        self._without = [place for place in places if not place]

    def _numbered(self) -> int:
        key = (*map(id, self._tensors), *self._placed)
        if key not in self._numbers:
            self._numbers[key] = next(self._next), self._tensors
        self._numbers.move_to_end(key)
        if len(self._numbers) > self._max_placements:
            self._numbers.popitem(last=False)
        number, _ = self._numbers[key]
        return number
