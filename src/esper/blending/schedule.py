"""How alpha moves: curves as pure functions, and the controller that ticks them."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import Field, FiniteFloat

from esper.lifecycle.alpha import AlphaCurve, AlphaMode
from esper.lifecycle.record import Record

DEFAULT_STEEPNESS = 8.0
"""Steepness of the SIGMOID curve: the logistic's argument runs over ±steepness/2."""

Alpha = Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]


def _linear(progress: float, _: float) -> float:
    return progress


def _cosine(progress: float, _: float) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def _sigmoid(progress: float, steepness: float) -> float:
    # logistic(x) = (1 + tanh(x / 2)) / 2, whose odd symmetry makes both ends exact.
    spread = math.tanh(0.25 * steepness)
    if spread == 0.0:  # the smallest floats: the limit is the straight line
        return progress
    return 0.5 * (1.0 + math.tanh(0.25 * steepness * (2.0 * progress - 1.0)) / spread)


_CURVES: Mapping[AlphaCurve, Callable[[float, float], float]] = {
    AlphaCurve.LINEAR: _linear,
    AlphaCurve.COSINE: _cosine,
    AlphaCurve.SIGMOID: _sigmoid,
}


def curve_value(
    curve: AlphaCurve, progress: float, *, steepness: float = DEFAULT_STEEPNESS
) -> float:
    """Return the curve at `progress`: 0 at 0, 1 at 1, non-decreasing between.

    Args:
        curve: The shape.
        progress: Fraction of the ramp that is done, in [0, 1].
        steepness: Of the SIGMOID only, in (0, 500].

    Raises:
        ValueError: `progress` or `steepness` lies outside its range.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    if not 0.0 < steepness <= 500.0:
        raise ValueError(f"steepness must lie in (0, 500], got {steepness}")
    return min(1.0, max(0.0, _CURVES[curve](progress, steepness)))


class AlphaState(Record):
    """Everything an alpha controller knows; what it was, it becomes again from this."""

    alpha: Alpha = 0.0
    mode: AlphaMode = AlphaMode.HOLD
    start: Alpha = 0.0
    target: Alpha = 0.0
    steps: Annotated[int, Field(ge=0)] = 0
    steps_done: Annotated[int, Field(ge=0)] = 0
    steps_held: Annotated[int, Field(ge=0)] = 0
    """Ticks since alpha arrived at its target."""
    curve: AlphaCurve = AlphaCurve.COSINE
    steepness: FiniteFloat = DEFAULT_STEEPNESS


class AlphaController:
    """Moves alpha monotonically to a target, one tick per batch, and snaps to it.

    alpha(k) = start + (target - start) * curve(k / steps), and exactly `target` at k = steps.
    """

    def __init__(self, state: AlphaState | None = None) -> None:
        self._state = state or AlphaState()
        self._held = 0
        """Ticks in HOLD that the state does not have yet: most ticks are, and a record is slow."""

    @property
    def state(self) -> AlphaState:
        """Everything it knows."""
        if self._held:
            held = self._state.steps_held + self._held
            self._state = self._state.model_copy(update={"steps_held": held})
            self._held = 0
        return self._state

    @property
    def alpha(self) -> float:
        """The current alpha, in [0, 1]."""
        return self._state.alpha

    @property
    def mode(self) -> AlphaMode:
        """HOLD, or the direction of the ramp under way."""
        return self._state.mode

    def retarget(
        self,
        target: float,
        steps: int,
        *,
        curve: AlphaCurve = AlphaCurve.COSINE,
        steepness: float = DEFAULT_STEEPNESS,
    ) -> None:
        """Start a ramp to `target` over `steps` ticks; `steps` 0 arrives at once.

        Raises:
            ValueError: A ramp is under way, `target` is not in [0, 1] or is where alpha already
                stands, `steps` is negative, or `steepness` is out of range.
        """
        state = self.state
        if state.mode is not AlphaMode.HOLD:
            raise ValueError(
                f"alpha is on its way {state.mode.name.lower()} from {state.start:g} to "
                f"{state.target:g}, {state.steps_done} of {state.steps} steps done, and takes no "
                "other target meanwhile; wait until it has arrived, or prune the seed"
            )
        if not (math.isfinite(target) and 0.0 <= target <= 1.0):
            raise ValueError(f"alpha target must lie in [0, 1], got {target}")
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        if target == state.alpha:
            raise ValueError(f"alpha already stands at {target:g}; there is nothing to ramp")
        curve_value(curve, 0.0, steepness=steepness)
        mode = AlphaMode.UP if target > state.alpha else AlphaMode.DOWN
        self._state = AlphaState(
            alpha=target if steps == 0 else state.alpha,
            mode=AlphaMode.HOLD if steps == 0 else mode,
            start=state.alpha,
            target=target,
            steps=steps,
            curve=curve,
            steepness=steepness,
        )

    def tick(self) -> bool:
        """Advance by one batch.

        Returns:
            Whether alpha arrived at its target in this tick.
        """
        state = self._state
        if state.mode is AlphaMode.HOLD:
            self._held += 1
            return False
        done = state.steps_done + 1
        if done >= state.steps:
            arrived = {"alpha": state.target, "mode": AlphaMode.HOLD, "steps_done": done}
            self._state = state.model_copy(update=arrived)
            return True
        fraction = curve_value(state.curve, done / state.steps, steepness=state.steepness)
        alpha = state.start + (state.target - state.start) * fraction
        # A saturated curve may round past the target, and snapping to it would then step back.
        arriving = min if state.mode is AlphaMode.UP else max
        alpha = arriving(alpha, state.target)
        self._state = state.model_copy(update={"alpha": alpha, "steps_done": done})
        return False

    def hold(self) -> None:
        """Stop a ramp where it is; a controller that holds is left as it is."""
        if self._state.mode is not AlphaMode.HOLD:
            alpha = self._state.alpha
            self._state = AlphaState(alpha=alpha, start=alpha, target=alpha)
