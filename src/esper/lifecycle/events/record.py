"""An event as it is stored and sent."""

from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from esper.lifecycle.events.run_events import (
    ActionApplied,
    ActionRefused,
    ArtefactRefused,
    BusLost,
    BusRegained,
    CachesSwept,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    CommandCarriedOut,
    CommandRefused,
    CompileFailed,
    EnvironmentRestarted,
    RewardGiven,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    RunWentBack,
    SinkFailed,
    SinkLossesCounted,
    StepCaptured,
    StepSkipped,
    TwinFinished,
)
from esper.lifecycle.events.seed_events import (
    AlphaTargetReached,
    AlphaTargetSet,
    AmplitudeSearched,
    BreakerChanged,
    ContributionMeasured,
    GateEvaluated,
    GerminationFailed,
    GradientHealthMeasured,
    IsolationChecked,
    IsolationViolated,
    SeedBlamed,
    SeedCommitted,
    SeedCompiled,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    SeedRescaled,
    SlotReset,
    StageChanged,
)
from esper.lifecycle.record import Record

SCHEMA_VERSION: Final = 1
"""Version of the event records on disk and on the wire."""

Event = Annotated[
    RunStarted
    | RunFinished
    | RunFailed
    | TwinFinished
    | RewardGiven
    | EnvironmentRestarted
    | StageChanged
    | GateEvaluated
    | SeedGerminated
    | GerminationFailed
    | AlphaTargetSet
    | AlphaTargetReached
    | AmplitudeSearched
    | SeedRescaled
    | ContributionMeasured
    | GradientHealthMeasured
    | IsolationChecked
    | IsolationViolated
    | SeedCommitted
    | SeedPruned
    | SeedFailed
    | SlotReset
    | BreakerChanged
    | StepSkipped
    | SeedBlamed
    | RunWentBack
    | ActionApplied
    | ActionRefused
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointDamaged
    | RunResumed
    | SeedCompiled
    | CompileFailed
    | StepCaptured
    | ArtefactRefused
    | CommandCarriedOut
    | CommandRefused
    | BusLost
    | BusRegained
    | CachesSwept
    | SinkFailed
    | SinkLossesCounted,
    Field(discriminator="type"),
]


class EventRecord(Record):
    """An event with when it happened, as stored and sent."""

    schema_version: Literal[1] = SCHEMA_VERSION
    time_seconds: float
    """Seconds since the Unix epoch."""
    epoch: int
    """Decisions so far; what is measured for one, and what comes of it, counts it already."""
    step: int
    event: Event


class EventSchemaError(ValueError):
    """A stored or received event that this version cannot read."""


_RECORD: TypeAdapter[EventRecord] = TypeAdapter(EventRecord)
_NOT_A_RECORD = f"not an event record of schema version {SCHEMA_VERSION}"


def parse_event_record(document: str | bytes) -> EventRecord:
    """Read an event record from JSON.

    Raises:
        EventSchemaError: The schema version is missing or another one, or a field or type is
            unknown; the message names it.
    """
    try:
        record = _RECORD.validate_json(document)
    except ValidationError as error:
        details = "; ".join(_describe(issue) for issue in error.errors())
        raise EventSchemaError(f"{_NOT_A_RECORD}: {details}") from error
    if "schema_version" not in record.model_fields_set:
        raise EventSchemaError(f"{_NOT_A_RECORD}: schema_version: Field required")
    return record


def _describe(issue: ErrorDetails) -> str:
    place = ".".join(str(part) for part in issue["loc"]) or "document"
    given = issue["input"]
    got = f", got {given!r}" if issue["type"] == "literal_error" else ""
    return f"{place}: {issue['msg']}{got}"
