"""The losses of steps, kept where they are until their mean is asked for."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_PACKED_AT = 256
"""Losses that are packed into one tensor: copying it takes as long as copying a single one."""


class StepLosses:
    """Training losses of many steps, on their device; only the mean waits for it.

    A step counts by its batches: the mean of all is Σ nᵢ·lossᵢ / Σ nᵢ.
    """

    def __init__(self) -> None:
        self._packed: list[Tensor] = []
        """Each nᵢ·lossᵢ of many."""
        self._single: list[Tensor] = []
        """0-dim, in the order of steps."""
        self._num_batches = 0

    def add(self, loss: Tensor, *, num_batches: int = 1) -> None:
        """Take the next step's loss.

        Args:
            loss: Mean over the step's batches, 0-dim and detached; must not change any more.
            num_batches: That the step was made of.
        """
        self._single.append(loss if num_batches == 1 else loss * num_batches)
        self._num_batches += num_batches
        if len(self._single) == _PACKED_AT:
            self._packed.append(torch.stack(self._single))
            self._single = []

    def __len__(self) -> int:
        return sum(map(len, self._packed)) + len(self._single)

    def mean(self) -> float:
        """Return the mean of all losses; NaN where there is none. Waits for the device.

        It is taken in float32 where losses are less precise.
        """
        weighed = self._weighed()
        if not len(weighed):
            return math.nan
        exact = torch.promote_types(weighed.dtype, torch.float32)
        return float(weighed.mean(dtype=exact)) * (len(weighed) / self._num_batches)

    def clear(self) -> None:
        """Forget all losses."""
        self._packed, self._single, self._num_batches = [], [], 0

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, copied; no host–device synchronisation."""
        return {"weighed": self._weighed(), "num_batches": self._num_batches}

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Go on from losses that were kept, on the device of the steps to come."""
        weighed = state["weighed"]
        self._packed = [weighed.to(device)] if len(weighed) else []
        self._single = []
        self._num_batches = state["num_batches"]

    def _weighed(self) -> Tensor:
        """Return each nᵢ·lossᵢ in the order of steps, copied."""
        single = [torch.stack(self._single)] if self._single else []
        parts = [*self._packed, *single]
        if not parts:
            return torch.empty(0)
        return torch.cat([part.to(parts[-1].device) for part in parts])
