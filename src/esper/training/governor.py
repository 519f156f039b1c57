"""What stands between a bad step and the model."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from esper.lifecycle.events import StepSkipped
from esper.lifecycle.record import Record

_SIGMA_PER_MAD = 1.4826
"""Standard deviations in one median absolute deviation of a normal distribution."""
_RENEWED_STEPS = 8
"""The band follows the losses at every so manyth good step: two medians take some microseconds."""
_LEAST_SPREAD = 0.05
"""Of the median: a loss that hardly varies may still rise by so much, times the band's width."""
_PLAIN_SHARE = 0.4
"""Of the plain standard deviation, which sees the few losses far above the others that the robust
one does not. With a larger share a loss that grows from step to step would carry the band along: at
a width of 20 over 64 steps a single loss lets it reach just as far as it lies itself."""


class GovernorConfig(Record):
    """Which steps are refused, and when a run goes back."""

    band_width: Annotated[FiniteFloat, Field(gt=0.0)] | None = 20.0
    """A loss is bad if it lies so many robust standard deviations above the median of recent
    losses, each at least 5 % of that median and 40 % of the plain standard deviation; None refuses
    only what is not finite."""
    history_steps: Annotated[int, Field(ge=8)] = 64
    """Good steps that the band is taken of; before there are so many there is none. One whose loss
    is 0 does not count: it tells nothing of how large a loss may be. Counted anew where a seed
    leaves the forward path, after which the loss may rise."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 3
    """In a row, after which a seed is pruned or the run goes back."""
    snapshot_steps: Annotated[int, Field(ge=1)] | None = 200
    """Steps between two snapshots in memory, beside the model, to go back to; None makes none."""
    max_returns: Annotated[int, Field(ge=1)] = 2
    """To one snapshot, the first with the same batches, later ones with others; then the run ends
    with an error."""


class Governor:
    """Refuses steps whose loss or host gradient norm is not finite, or whose loss is far too high.

    `look` starts reading a loss; `judge` tells the verdict. On a GPU the copy of the loss runs
    beside the backward pass, so waiting for it leaves the device busy.
    """

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        self.bad_steps = 0
        """In a row, up to now."""
        self.last_skipped: StepSkipped | None = None
        """What told so, if the last step was skipped."""
        self._history: deque[float] = deque(maxlen=self.config.history_steps)
        self._limit: float | None = None
        self._unread = 0
        """Losses since the limit was taken."""
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

    def judge(self, gradient_norm: Tensor | None = None) -> StepSkipped | None:
        """Return why the optimizer must not step, or None if it may.

        Args:
            gradient_norm: The host's, where clipping has measured it; reading it waits for the
                backward pass.
        """
        loss = self._read()
        if loss is not None:
            if not math.isfinite(loss):
                return StepSkipped(reason="the loss is not finite", value=loss)
            if self.is_bad(loss):
                return StepSkipped(
                    reason=f"the loss is above {self._limit:.4g}, {self.config.band_width:g} "
                    f"deviations over the last {len(self._history)}",
                    value=loss,
                )
        if gradient_norm is not None:
            norm = float(gradient_norm)
            if not math.isfinite(norm):
                return StepSkipped(reason="the host's gradient norm is not finite", value=norm)
        if loss is not None:
            self._note(loss)
        return None

    def count(self, skipped: StepSkipped | None) -> None:
        """Count bad steps in a row.

        Args:
            skipped: Tells that the step was skipped; None if it was made.
        """
        self.last_skipped = skipped
        bad = skipped is not None and not skipped.of_search
        self.bad_steps = self.bad_steps + 1 if bad else 0

    def begin_anew(self) -> None:
        """Count from none: what made steps bad is gone."""
        self.bad_steps = 0

    def is_bad(self, loss: float) -> bool:
        """Whether a loss is not finite, or above the band of recent ones."""
        return not math.isfinite(loss) or (self._limit is not None and loss > self._limit)

    @property
    def at_a_loss(self) -> bool:
        """Whether so many steps in a row were bad that skipping more of them will not help."""
        return self.bad_steps >= self.config.max_bad_steps

    def forget_losses(self) -> None:
        """Begin a new history: the loss may rise now, and not be bad for that."""
        self._history.clear()
        self._limit = None

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses, and the bad steps in a row."""
        history = list(self._history)
        return {
            "history": history,
            "limit": self._limit,
            "unread": self._unread,
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._history = deque(state["history"], maxlen=self.config.history_steps)
        self._limit, self._unread = state["limit"], state["unread"]
        self.bad_steps = state["bad_steps"]

    def _read(self) -> float | None:
        """Return the loss that was looked at, once."""
        if self._loss is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, self._loss = float(self._loss), None
        return loss

    def _note(self, loss: float) -> None:
        if loss == 0.0:
            return
        history, width = self._history, self.config.band_width
        history.append(loss)
        self._unread += 1
        full = len(history) == self.config.history_steps
        if width is None or not full or (self._limit is not None and self._unread < _RENEWED_STEPS):
            return
        self._unread = 0
        centre = median(history)
        distances = [abs(value - centre) for value in history]
        robust = _SIGMA_PER_MAD * median(distances)
        plain = math.hypot(*distances) / math.sqrt(len(distances))
        spread = max(robust, _LEAST_SPREAD * abs(centre), _PLAIN_SHARE * plain)
        self._limit = centre + width * spread
