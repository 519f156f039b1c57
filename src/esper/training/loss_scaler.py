"""The loss scale of float16, whose steps may be skipped."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.lifecycle.events import StepSkipped
from esper.slots.optimizer_binding import skips_step


class LossScaler:
    """A GradScaler that tells which steps it skips; without float16 it scales and skips nothing.

    Args:
        device: Of the model.
        enabled: Whether gradients are those of float16.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self._unscaled = False

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss as the backward must see it."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer) -> None:
        """Give gradients their own size before the step, as clipping needs."""
        if not _has_gradient(optimizer):
            return
        self._scaler.unscale_(optimizer)
        self._unscaled = self.enabled

    def step(self, optimizer: Optimizer) -> StepSkipped | None:
        """Let the optimizer step unless a gradient is not finite, and renew the scale.

        Returns:
            What tells of it, if the step was skipped.

        Effects: waits for the backward with float16, and not otherwise.
        """
        if not self.enabled or not _has_gradient(optimizer):
            optimizer.step()
            return None
        stepped = False

        def note(stepping: Optimizer, *_: Any) -> None:
            nonlocal stepped
            stepped = not skips_step(stepping)

        self._unscaled = True  # it does so where nobody has
        handle = optimizer.register_step_post_hook(note)
        try:
            self._scaler.step(optimizer)
        finally:
            handle.remove()
        skipped = None if stepped else self._skipped()
        self._update()
        return skipped

    def drop(self) -> None:
        """Make no step of gradients that somebody else refuses."""
        if self._unscaled:
            self._update()

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and what it is renewed by."""
        state: dict[str, Any] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._scaler.load_state_dict(dict(state))

    def _update(self) -> None:
        self._scaler.update()
        self._unscaled = False

    def _skipped(self) -> StepSkipped:
        scale = self._scaler.get_scale()
        return StepSkipped(
            reason=f"a gradient is not finite at loss scale {scale:g}, which is lowered",
            value=math.nan,
            loss_scale=scale,
        )


def _has_gradient(optimizer: Optimizer) -> bool:
    """Return whether there is anything to scale: not so on a frozen host whose seeds are frozen."""
    groups = optimizer.param_groups
    return any(parameter.grad is not None for group in groups for parameter in group["params"])
