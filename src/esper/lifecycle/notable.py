"""Which events somebody who watches a run would want to know, in their words."""

from esper.lifecycle.events import (
    ActionRefused,
    ArtefactRefused,
    BreakerChanged,
    BusLost,
    BusRegained,
    CheckpointDamaged,
    CheckpointFailed,
    CommandCarriedOut,
    CommandRefused,
    CompileFailed,
    EnvironmentRestarted,
    Event,
    EventRecord,
    GateEvaluated,
    GerminationFailed,
    IsolationViolated,
    RunFailed,
    RunResumed,
    RunWentBack,
    SeedBlamed,
    SeedCommitted,
    SeedCompiled,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    SinkFailed,
    SinkLossesCounted,
    SlotReset,
    StepCaptured,
    StepSkipped,
)
from esper.lifecycle.stages import SeedStage

_TOLD_GATES = (SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY)
_TOLD = (
    *(SeedGerminated, SeedCommitted, SeedPruned, SeedFailed, SeedBlamed, SeedCompiled),
    *(GerminationFailed, IsolationViolated, ActionRefused, CommandCarriedOut, CommandRefused),
    *(RunWentBack, RunFailed, RunResumed, CheckpointFailed, CheckpointDamaged),
    *(CompileFailed, StepCaptured, ArtefactRefused, SinkFailed, SinkLossesCounted),
    *(EnvironmentRestarted, BusLost, BusRegained),
)


def notable(record: EventRecord, unit: str) -> str | None:
    """Return an event with its epoch if a person at the terminal would want to know, else None.

    Of an error that ends the run the program itself tells.

    Args:
        record: The event.
        unit: What its epoch counts.
    """
    words = None if isinstance(record.event, RunFailed) else in_words(record)
    return None if words is None else f"{unit} {record.epoch}: {words}"


def in_words(record: EventRecord) -> str | None:
    """Return an event in words if a person watching would want to know, else None."""
    event = record.event
    if isinstance(event, StepSkipped):
        return f"step {record.step} skipped: {event.reason}"
    return str(event) if _is_told(event) else None


def _is_told(event: Event) -> bool:
    if isinstance(event, GateEvaluated):
        return event.result.passed and event.to_stage in _TOLD_GATES
    if isinstance(event, SlotReset):
        return bool(event.leftovers)
    if isinstance(event, BreakerChanged):
        return event.to_state == "open"
    return isinstance(event, _TOLD)
