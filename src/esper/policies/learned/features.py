"""What a learned policy sees: named numbers, each within [-1, 1], the same for every host.

All of them are shares, relative changes or squashed counts, so that a policy meets the same ranges
on a host, a task or a run length that it was not trained on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType

from esper.lifecycle.actions import GrowthState, SlotState
from esper.lifecycle.alpha import AlphaMode
from esper.lifecycle.record import Record
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.policies.learned.action_coder import ActionCoder
from esper.policies.timing import elapsed_fraction

_RECENT_EPOCHS = (1, 3, 8)
_RECENT_GAIN = 20.0
"""A fall of 5 % within some epochs is large."""
_FRACTION_GAIN = 20.0
"""So is a seed that saves 5 % of the loss."""
_STAGE_EPOCHS = 8.0
_REFUSALS = 4.0
_HALF_SIZE = 0.1
"""The share of the host's parameters at which a size is 0.5."""


class WatchedLoss(StrEnum):
    """Which loss tells how a run goes."""

    HELD_OUT = "held_out"
    TRAINING = "training"


class ObservationConfig(Record):
    """What a learned policy looks at."""

    loss: WatchedLoss = WatchedLoss.HELD_OUT
    """The held-out one has to be evaluated at each decision, which is then a cost of deciding; the
    mean training loss since the last decision is there anyway."""

    def seen(self, state: GrowthState) -> GrowthState:
        """Return the state with the watched loss in place of the held-out one.

        Raises:
            ValueError: The training loss is to be watched, and the loop does not tell it.
        """
        if self.loss is WatchedLoss.HELD_OUT:
            return state
        if len(state.train_losses) < state.epoch:
            raise ValueError(
                "the learned policy decides by the training loss, and the loop does not tell it; "
                "pass it: growth.after_epoch(evaluate, train_loss=…)"
            )
        return state.model_copy(update={"losses": state.train_losses, "train_losses": ()})


def relative_fall(before: float, now: float) -> float:
    """Return (before - now) / (|before| + |now|), within [-1, 1]; 0 where both are 0 or unknown."""
    scale = abs(before) + abs(now)
    return (before - now) / scale if math.isfinite(scale) and scale > 0.0 else 0.0


def relative_size(param_count: int, host_param_count: int) -> float:
    """Return r / (r + 0.1) with r the share of the host's parameters: within [0, 1), 0.5 at 10 %.

    Raises:
        ValueError: The host has no parameters.
    """
    if host_param_count <= 0:
        raise ValueError(
            f"sizes are shares of the host's parameters, and there are {host_param_count}; the "
            "state must tell host_param_count, as esper.Growth does"
        )
    share = param_count / host_param_count
    return share / (share + _HALF_SIZE)


def _squashed(value: float | None, gain: float) -> float:
    return math.tanh(gain * value) if value is not None and not math.isnan(value) else 0.0


def _recent_fall(epochs: int) -> Callable[[GrowthState], float]:
    def feature(state: GrowthState) -> float:
        losses = state.losses
        if len(losses) <= epochs:
            return 0.0
        return math.tanh(_RECENT_GAIN * relative_fall(losses[-1 - epochs], losses[-1]))

    return feature


def _held_out_gap(state: GrowthState) -> float:
    if not (state.losses and state.train_losses):
        return 0.0
    return relative_fall(state.losses[-1], state.train_losses[-1])


RUN_FEATURES: Mapping[str, Callable[[GrowthState], float]] = MappingProxyType(
    {
        "elapsed_fraction": elapsed_fraction,
        **{f"loss_fall_{epochs}": _recent_fall(epochs) for epochs in _RECENT_EPOCHS},
        "loss_fall_from_start": lambda state: (
            relative_fall(state.losses[0], state.losses[-1]) if state.losses else 0.0
        ),
        "loss_is_finite": lambda state: float(
            bool(state.losses) and math.isfinite(state.losses[-1])
        ),
        "held_out_over_train": _held_out_gap,
        "growth": lambda state: relative_size(
            state.param_count - state.host_param_count, state.host_param_count
        ),
        "living_fraction": lambda state: (
            sum(slot.stage in LIVING_STAGES for slot in state.slots) / len(state.slots)
        ),
        "committed_fraction": lambda state: (
            sum(slot.committed for slot in state.slots)
            / sum(slot.max_committed for slot in state.slots)
        ),
    }
)
"""Of the whole run."""


def _is_in(stage: SeedStage) -> Callable[[SlotState], float]:
    return lambda slot: float(slot.stage is stage)


SLOT_FEATURES: Mapping[str, Callable[[SlotState], float]] = MappingProxyType(
    {
        **{f"is_{stage}": _is_in(stage) for stage in SeedStage},
        "alpha": lambda slot: slot.alpha,
        "alpha_rises": lambda slot: float(slot.alpha_mode is AlphaMode.UP),
        "alpha_falls": lambda slot: float(slot.alpha_mode is AlphaMode.DOWN),
        "live": lambda slot: float(slot.live),
        "fading": lambda slot: float(slot.fading),
        "epochs_in_stage": lambda slot: math.tanh(slot.epochs_in_stage / _STAGE_EPOCHS),
        "refusals": lambda slot: math.tanh(slot.refusals_in_stage / _REFUSALS),
        "committed_fraction": lambda slot: slot.committed / slot.max_committed,
        "gradient_ratio_known": lambda slot: float(slot.gradient_ratio is not None),
        "gradient_ratio": lambda slot: _squashed(slot.gradient_ratio, 1.0),
        "line_search_gain_known": lambda slot: float(slot.line_search_gain_fraction is not None),
        "line_search_gain": lambda slot: _squashed(slot.line_search_gain_fraction, _FRACTION_GAIN),
        "contribution_known": lambda slot: float(slot.contribution_fraction is not None),
        "contribution": lambda slot: _squashed(slot.contribution_fraction, _FRACTION_GAIN),
    }
)
"""Of each slot; its place among the slots, in [0, 1], follows them."""


def feature_names(coder: ActionCoder) -> list[str]:
    """Return the name of each number that `features` returns, in order."""
    names = list(RUN_FEATURES)
    for path in coder.slots:
        names += [f"{path}.{name}" for name in (*SLOT_FEATURES, "place")]
    names += [f"{path}.size of {name}" for path in coder.slots for name in coder.blueprints]
    names += [f"{path}.fits {name}" for path in coder.slots for name in coder.blueprints]
    return names


def features(
    state: GrowthState, coder: ActionCoder, observation: ObservationConfig | None = None
) -> list[float]:
    """Return what is to be seen of a state, each number within [-1, 1].

    First `RUN_FEATURES`, then for each slot `SLOT_FEATURES` and its place, then for each pair of
    slot and blueprint its `relative_size`, then for each whether it fits, 1 or 0. What is not
    measured is 0, and the feature beside it says so. Where the training loss is watched it stands
    for the held-out one, and there is no gap between them.

    Raises:
        ValueError: The run's length, the host's size or the watched loss is not known, or the slots
            are others.
    """
    coder.check_host(state)
    seen = (observation or ObservationConfig()).seen(state)
    values = [feature(seen) for feature in RUN_FEATURES.values()]
    last = max(len(state.slots) - 1, 1)
    for place, slot in enumerate(state.slots):
        values += [feature(slot) for feature in SLOT_FEATURES.values()]
        values.append(place / last)
    values += _sizes(state, coder)
    values += [float(fit) for fits in coder.fits(state) for fit in fits]
    return values


def _sizes(state: GrowthState, coder: ActionCoder) -> Sequence[float]:
    sizes = []
    for slot in state.slots:
        counts = {choice.name: choice.param_count for choice in slot.choices}
        sizes += [
            relative_size(counts[name], state.host_param_count) if name in counts else 0.0
            for name in coder.blueprints
        ]
    return sizes
