"""What came of an action, read off the events that it caused."""

from collections.abc import Sequence

from esper.lifecycle.commands import Outcome
from esper.lifecycle.events import (
    ActionRefused,
    AlphaTargetSet,
    Event,
    GateEvaluated,
    GerminationFailed,
    SeedCommitted,
    SeedGerminated,
    SeedPruned,
    StageChanged,
)

_MAX_CHARACTERS = 4_000


def came_of(events: Sequence[Event]) -> Outcome:
    """Return whether an action had an effect, and its result or the reason why not.

    Args:
        events: All that the action has caused, as `Growth.apply` returns them.
    """
    refusals = [reason for event in events if (reason := _refusal(event)) is not None]
    effects = [words for event in events if (words := _effect(event)) is not None]
    effects += _stages(events)
    told = "; ".join([*effects, *refusals]) or "nothing was to be done"
    if len(told) > _MAX_CHARACTERS:  # an error may quote whatever was asked
        told = f"{told[:_MAX_CHARACTERS]} …"
    return Outcome(done=bool(effects) or not refusals, text=told)


def _refusal(event: Event) -> str | None:
    if isinstance(event, ActionRefused):
        return event.reason
    if isinstance(event, GerminationFailed):
        return f"{event.blueprint} could not germinate in {event.slot}: {event.error}"
    if isinstance(event, GateEvaluated) and not (event.result.passed or event.result.forced):
        failures = "; ".join(str(check) for check in event.result.failures)
        return f"{event.result.gate} refused {event.blueprint} in {event.slot}: {failures}"
    return None


def _effect(event: Event) -> str | None:
    if isinstance(event, SeedGerminated):
        return f"{event.blueprint} germinated in {event.slot} (+{event.param_count:,})"
    if isinstance(event, SeedCommitted):
        return f"{event.blueprint} committed in {event.slot}"
    if isinstance(event, SeedPruned):
        return f"{event.blueprint} pruned from {event.slot}"
    if isinstance(event, AlphaTargetSet):
        return f"alpha of {event.slot} goes to {event.target:g} within {event.steps} steps"
    return None


def _stages(events: Sequence[Event]) -> list[str]:
    """Return where each slot has come to."""
    last = {event.slot: event.to_stage for event in events if isinstance(event, StageChanged)}
    return [f"{slot} is {stage.name}" for slot, stage in last.items()]
