"""What an action does to its slot."""

from collections.abc import Iterator, Sequence

from esper.lifecycle.actions import (
    Action,
    Advance,
    Commit,
    Germinate,
    Prune,
    SetAlphaTarget,
)
from esper.lifecycle.events import Event, GerminationFailed, StageChanged
from esper.lifecycle.learning import Isolation
from esper.lifecycle.stages import SeedStage
from esper.slots.germination import GerminationError
from esper.slots.slot import SeedSlot
from esper.training.seed_readings import SeedReadings
from esper.training.step_times import StepTimes

_NO_OPTIONS = frozenset({"self", "blueprint", "blend_operator", "copy_optimizer_state"})
"""What germinating takes beside a blueprint's options."""


class ActionRunner:
    """Carries out actions that are legal.

    Args:
        readings: A gate that a seed is to pass judges the newest.
        step_times: Are told when the network changes.
    """

    def __init__(self, readings: SeedReadings, step_times: StepTimes) -> None:
        self._readings = readings
        self._step_times = step_times

    def carry_out(
        self, slot: SeedSlot, action: Action, *, held_out_loss: float | None
    ) -> Iterator[Sequence[Event]]:
        """Carry out one action, and yield what happens as it goes on.

        Args:
            slot: That the action names.
            action: Any but WAIT.
            held_out_loss: The last finite one, which a new seed is compared with; None before that.
        """
        if isinstance(action, Germinate):
            yield from self._germinate(slot, action, held_out_loss)
        elif isinstance(action, Advance):
            yield self._readings.read_isolation()
            events = slot.advance()
            yield events
            if _entered(events, SeedStage.BLENDING):
                yield self._start_ramp(slot, action)
        elif isinstance(action, SetAlphaTarget):
            if action.target != slot.alpha:
                yield slot.set_alpha_target(action.target, action.steps, curve=action.curve)
        elif isinstance(action, Prune):
            yield slot.prune(action.over_steps, reason=action.reason)
        elif isinstance(action, Commit):
            yield slot.advance()

    def _germinate(
        self, slot: SeedSlot, action: Germinate, held_out_loss: float | None
    ) -> Iterator[Sequence[Event]]:
        try:
            _check_options(action)
            events = slot.germinate(
                action.blueprint,
                blend_operator=action.blend_operator,
                copy_optimizer_state=action.copy_optimizer_state,
                **action.options,
            )
        except (GerminationError, ValueError) as error:
            earlier = error.events if isinstance(error, GerminationError) else []
            failed = GerminationFailed(slot=slot.path, blueprint=action.blueprint, error=str(error))
            yield [*earlier, failed]
            return
        yield events
        self._step_times.seed_comes(slot.path)
        slot.measurements.reference_loss = held_out_loss
        events = slot.advance()
        if slot.isolation is Isolation.NONE and _entered(events, SeedStage.TRAINING):
            events += slot.advance()
            if _entered(events, SeedStage.BLENDING):
                events += slot.set_alpha_target(1.0, 0)
        yield events

    def _start_ramp(self, slot: SeedSlot, action: Advance) -> Sequence[Event]:
        steps = slot.config.ramp_steps if action.ramp_steps is None else action.ramp_steps
        curve = action.ramp_curve or slot.config.ramp_curve
        self._step_times.network_changes()
        return slot.set_alpha_target(1.0, steps, curve=curve)


def _check_options(action: Germinate) -> None:
    """Raise if an option would pass for something else.

    Raises:
        ValueError: No blueprint can have it.
    """
    taken = sorted(_NO_OPTIONS & action.options.keys())
    if taken:
        raise ValueError(f"blueprint {action.blueprint!r} has no option {taken[0]!r}")


def _entered(events: Sequence[Event], stage: SeedStage) -> bool:
    return any(isinstance(event, StageChanged) and event.to_stage is stage for event in events)
