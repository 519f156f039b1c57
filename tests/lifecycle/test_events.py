"""Every event type survives JSON; what cannot be read says so; priorities follow from content."""

import json
import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError

from esper.lifecycle import Commit, Prune, Record, SeedStage
from esper.lifecycle import events as events_module
from esper.lifecycle.commands import Pause
from esper.lifecycle.events import (
    SCHEMA_VERSION,
    ActionRefused,
    ArtefactRefused,
    BreakerChanged,
    BusLost,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    CommandRefused,
    CompileFailed,
    EnvironmentRestarted,
    Event,
    EventRecord,
    EventSchemaError,
    GerminationFailed,
    GradientHealthMeasured,
    IsolationChecked,
    IsolationViolated,
    Priority,
    RunFailed,
    RunWentBack,
    SeedBlamed,
    SeedFailed,
    SeedPruned,
    SinkFailed,
    SinkLossesCounted,
    SlotReset,
    StepSkipped,
    parse_event_record,
)

EVENT_TYPES: tuple[type[Any], ...] = get_args(get_args(Event)[0])

_TEXT = st.text(max_size=6)
_SCALAR = st.none() | st.booleans() | st.integers(-9, 9) | _TEXT
_JSON = _SCALAR | st.lists(_SCALAR, max_size=2)


def values_of(annotation: Any, *, constrained: bool = False) -> st.SearchStrategy[Any]:
    """Draw values of a field's type; constrained numbers are drawn from [0, 1]."""
    if annotation is JsonValue:
        return _JSON
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0], constrained=True)
    if origin in (Union, types.UnionType):
        parts = [values_of(argument, constrained=constrained) for argument in arguments]
        return st.one_of(parts)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(_TEXT, values_of(arguments[1]), max_size=3)
    if issubclass(annotation, Record):
        return records_of(annotation)
    if issubclass(annotation, Enum):
        return st.sampled_from(annotation)
    simple: dict[type, st.SearchStrategy[Any]] = {
        float: st.floats(0.0, 1.0) if constrained else st.floats(),
        int: st.integers(0, 2**40),
        bool: st.booleans(),
        str: _TEXT,
        type(None): st.none(),
    }
    return simple[annotation]


def records_of(record: type[Record]) -> st.SearchStrategy[Any]:
    fields = {
        name: values_of(field.annotation, constrained=bool(field.metadata))
        for name, field in record.model_fields.items()
    }
    return st.builds(record, **fields)


def recorded(event: Any) -> EventRecord:
    return EventRecord(time_seconds=1.5, epoch=3, step=40, event=event)


def test_the_union_holds_every_event_type_under_a_tag_of_its_own():
    defined = {
        thing
        for thing in vars(events_module).values()
        if isinstance(thing, type) and issubclass(thing, Record) and "type" in thing.model_fields
    }
    assert set(EVENT_TYPES) == defined
    tags = [event_type.model_fields["type"].default for event_type in EVENT_TYPES]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("event_type", EVENT_TYPES, ids=lambda event_type: event_type.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_an_event_survives_json_non_finite_numbers_included(
    event_type: type[Any], data: st.DataObject
):
    event = data.draw(records_of(event_type))
    document = recorded(event).model_dump_json()
    json.loads(document, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = parse_event_record(document)
    assert type(back.event) is event_type
    assert back.model_dump_json() == document
    assert repr(back.event) == repr(event)
    assert back.event.priority is event.priority


def document_with(**changes: Any) -> str:
    event = SeedFailed(slot="a", blueprint="norm", error="boom")
    return json.dumps({**recorded(event).model_dump(mode="json"), **changes})


SEED_FAILED = {"type": "seed_failed", "slot": "a", "blueprint": "norm", "error": "boom"}


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (document_with(schema_version=2), r"schema_version: Input should be 1, got 2"),
        (document_with(schema_version="1"), r"schema_version: Input should be 1, got '1'"),
        (document_with(colour="red"), r"colour: Extra inputs"),
        (document_with(epoch=None), r"epoch: "),
        (document_with(event={**SEED_FAILED, "type": "seed_sang"}), r"event: .*'seed_sang'"),
        (document_with(event={"slot": "a"}), r"event: .*'type'"),
        (
            document_with(event={**SEED_FAILED, "colour": "red"}),
            r"event\.seed_failed\.colour: Extra inputs",
        ),
        (
            document_with(event={"type": "seed_failed", "slot": "a", "error": "boom"}),
            r"event\.seed_failed\.blueprint: Field required",
        ),
        ("{", r"document: Invalid JSON"),
        ("[]", r"document: "),
    ],
)
def test_what_this_version_cannot_read_is_refused_by_name(document: str, named: str):
    with pytest.raises(EventSchemaError, match=named) as refusal:
        parse_event_record(document)
    assert f"schema version {SCHEMA_VERSION}" in str(refusal.value)


def test_a_document_without_a_schema_version_is_refused():
    document = json.loads(document_with())
    del document["schema_version"]
    with pytest.raises(EventSchemaError, match=r"schema_version: Field required"):
        parse_event_record(json.dumps(document))


def health(**changes: Any) -> GradientHealthMeasured:
    healthy = {
        "slot": "a",
        "host_norm": 1.0,
        "seed_norm": 1.0,
        "ratio": 1.0,
        "nonfinite_steps": 0,
        "vanishing": False,
        "exploding": False,
    }
    return GradientHealthMeasured(**{**healthy, **changes})


def breaker(to_state: str) -> BreakerChanged:
    return BreakerChanged(breaker="b", from_state="closed", to_state=to_state, failures=3)


@pytest.mark.parametrize(
    ("event", "priority"),
    [
        (SeedFailed(slot="a", blueprint="b", error="e"), Priority.CRITICAL),
        (StepSkipped(reason="loss is NaN", value=1.0), Priority.CRITICAL),
        (CheckpointFailed(name="a", error="disk full"), Priority.CRITICAL),
        (SeedBlamed(slot="a", blueprint="b", loss=9.0, loss_without=1.0), Priority.CRITICAL),
        (RunWentBack(from_step=9, to_step=3, same_batches=True), Priority.CRITICAL),
        (RunFailed(error="ValueError: e"), Priority.CRITICAL),
        (CheckpointDamaged(name="a", error="changed"), Priority.WARNING),
        (CompileFailed(place="a", blueprint="b", error="e"), Priority.WARNING),
        (ArtefactRefused(blueprint="b", reason="changed"), Priority.WARNING),
        (CheckpointSaved(name="a", seconds=1.0), Priority.NORMAL),
        (SlotReset(slot="a", leftovers=("hook",)), Priority.CRITICAL),
        (SlotReset(slot="a", leftovers=()), Priority.NORMAL),
        (GerminationFailed(slot="a", blueprint="b", error="e"), Priority.WARNING),
        (ActionRefused(action=Commit(slot="a"), reason="r"), Priority.WARNING),
        (health(), Priority.NORMAL),
        (health(vanishing=True, ratio=None), Priority.NORMAL),
        (health(exploding=True), Priority.WARNING),
        (health(nonfinite_steps=1), Priority.WARNING),
        (
            IsolationViolated(slot="a", blueprint="b", reached={"w": 0.1}, num_reached=1),
            Priority.CRITICAL,
        ),
        (
            IsolationChecked(slot="a", blueprint="b", checks=3, violations=1, without_verdict=0),
            Priority.NORMAL,
        ),
        (SinkFailed(sink="s", error="e"), Priority.WARNING),
        (CommandRefused(id="i", sender="s", command=Pause(), reason="r"), Priority.WARNING),
        (BusLost(concern="commands", error="e"), Priority.WARNING),
        (EnvironmentRestarted(reason="killed", num_restarts=1), Priority.WARNING),
        (breaker("open"), Priority.WARNING),
        (breaker("half_open"), Priority.NORMAL),
        (breaker("closed"), Priority.NORMAL),
        (
            SeedPruned(slot="a", blueprint="b", from_stage=SeedStage.TRAINING, reason="asked"),
            Priority.NORMAL,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_priority_follows_from_type_and_content(event: Any, priority: Priority):
    assert event.priority is priority


CAN_BE_URGENT = {
    SeedFailed,
    StepSkipped,
    SlotReset,
    GerminationFailed,
    ActionRefused,
    GradientHealthMeasured,
    IsolationViolated,
    BreakerChanged,
    CheckpointFailed,
    CheckpointDamaged,
    CompileFailed,
    ArtefactRefused,
    SeedBlamed,
    RunFailed,
    RunWentBack,
    SinkFailed,
    SinkLossesCounted,
    CommandRefused,
    BusLost,
    EnvironmentRestarted,
}


@given(data=st.data())
def test_every_other_event_is_normal_whatever_it_holds(data: st.DataObject):
    event_type = data.draw(st.sampled_from([t for t in EVENT_TYPES if t not in CAN_BE_URGENT]))
    assert data.draw(records_of(event_type)).priority is Priority.NORMAL


def test_the_caller_cannot_choose_a_priority():
    with pytest.raises(ValidationError, match="priority"):
        StepSkipped(reason="r", value=1.0, priority="normal")
    nested = ActionRefused(action=Prune(slot="a", reason="critical"), reason="critical")
    assert nested.priority is Priority.WARNING
