"""The losses of steps, kept where they are until their mean is asked for."""

import math

import torch
from torch import Tensor

_PACKED_AT = 256
"""Losses that are packed into one tensor: copying it takes as long as copying a single one."""


class StepLosses:
    """Training losses of many steps, on their device; only the mean waits for it."""

    def __init__(self) -> None:
        self._packed: list[Tensor] = []
        """Each of many losses."""
        self._single: list[Tensor] = []
        """0-dim, in the order of steps."""

    def add(self, loss: Tensor) -> None:
        """Take the next step's loss, 0-dim and detached, which must not change any more."""
        self._single.append(loss)
        if len(self._single) == _PACKED_AT:
            self._packed.append(torch.stack(self._single))
            self._single = []

    def __len__(self) -> int:
        return sum(map(len, self._packed)) + len(self._single)

    def take_mean(self) -> float:
        """Return the mean and forget all losses; NaN where there is none. Waits for the device."""
        losses, self._packed, self._single = self.tensor(), [], []
        return float(losses.mean()) if len(losses) else math.nan

    def tensor(self) -> Tensor:
        """Return the losses in the order of steps, copied; no host–device synchronisation."""
        single = [torch.stack(self._single)] if self._single else []
        parts = [*self._packed, *single]
        if not parts:
            return torch.empty(0)
        return torch.cat([part.to(parts[-1].device) for part in parts])

    def load(self, losses: Tensor, *, device: torch.device) -> None:
        """Go on from losses that were kept, on the device of the steps to come."""
        self._packed = [losses.to(device)] if len(losses) else []
        self._single = []
