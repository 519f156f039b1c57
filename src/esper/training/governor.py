"""What stands between a bad step and the model."""

import math

import torch
from torch import Tensor

from esper.lifecycle.events import StepSkipped


class Governor:
    """Refuses steps whose loss or host gradient norm is not finite.

    `look` starts reading a value; `refusal` tells the verdict. On a GPU the copy of the loss runs
    beside the backward pass, so waiting for it leaves the device busy.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def look(self, loss: Tensor) -> None:
        """Start reading the loss; call it right after the forward, before the backward."""
        value = loss.detach()
        self._arrived = None
        if value.device.type == "cuda":
            pinned = torch.empty((), dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
            value = pinned
        self._loss = value

    def refusal(self, gradient_norm: Tensor | None = None) -> StepSkipped | None:
        """Return why the optimizer must not step, or None if it may.

        Args:
            gradient_norm: The host's, where clipping has measured it; reading it waits for the
                backward pass.
        """
        if self._loss is not None:
            if self._arrived is not None:
                self._arrived.synchronize()
            loss = float(self._loss)
            self._loss = None
            if not math.isfinite(loss):
                return StepSkipped(reason="the loss is not finite", value=loss)
        if gradient_norm is not None:
            norm = float(gradient_norm)
            if not math.isfinite(norm):
                return StepSkipped(reason="the host's gradient norm is not finite", value=norm)
        return None
