"""Where a model's tensors lie, which a captured graph reads and writes."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn


class Placements:
    """Tells whether a model's parameters and buffers lie where they did, and learn if they did.

    Args:
        model: Modules in it come and go with what `number` calls its structure.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._structure: Hashable = None
        self._held: list[dict[str, nn.Parameter | None] | dict[str, Tensor | None]] = []
        self._placed: list[int] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._number = 0

    def number(self, structure: Hashable) -> int:
        """Return what is equal for equal places; it does not wait for the device.

        Args:
            structure: Another one where the model has other modules.
        """
        if structure != self._structure:
            self._structure = structure
            self._held = [
                held
                for part in self._model.modules()
                for held in (part._parameters, part._buffers)  # noqa: SLF001 – no public place
                if held
            ]
        # Looked up each time: what stands under a name may have been replaced by assignment.
        tensors = [
            tensor
            for held in self._held
            for tensor in held.values()
            if tensor is not None and tensor.layout is torch.strided
        ]
        placed = [*map(Tensor.data_ptr, tensors), *[tensor.requires_grad for tensor in tensors]]
        if placed != self._placed:
            self._placed = placed
            self._number = self._numbers.setdefault(tuple(placed), len(self._numbers))
        return self._number
