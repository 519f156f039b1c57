"""What is legal, by a table written by hand, and that the check agrees with the list."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.lifecycle import (
    Action,
    Advance,
    AlphaCurve,
    AlphaMode,
    BlendOperator,
    BlueprintChoice,
    Commit,
    Germinate,
    GrowthState,
    IllegalAction,
    LegalAction,
    Operation,
    Prune,
    SeedStage,
    SetAlphaTarget,
    SlotState,
    Wait,
    check_action,
    legal_actions,
    legal_operations,
    parse_action,
)

LEGAL_WHILE_HOLDING = {
    "DORMANT": {"germinate"},
    "GERMINATED": {"advance", "prune"},
    "TRAINING": {"advance", "prune"},
    "BLENDING": {"advance", "prune", "set_alpha_target"},
    "SHADOWING": {"advance", "prune"},
    "PROBATIONARY": {"commit", "prune"},
    "FOSSILIZED": set(),
    "PRUNED": set(),
    "EMBARGOED": set(),
    "RESETTING": set(),
    "TERMINATED": set(),
}


def slot_in(stage: SeedStage, **changes: Any) -> SlotState:
    choice = BlueprintChoice(name="norm", param_count=16)
    plain = {"path": "layer2", "family": "cnn", "dim": 8, "stage": stage, "choices": (choice,)}
    committed = int(stage in (SeedStage.FOSSILIZED, SeedStage.TERMINATED))
    return SlotState(**{**plain, "committed": committed, "max_committed": 1, **changes})


def asked(slot: SlotState) -> set[str]:
    return {str(operation) for operation in legal_operations(slot)} - {"wait"}


@pytest.mark.parametrize("stage", SeedStage, ids=lambda stage: stage.name)
def test_what_is_legal_in_each_stage(stage: SeedStage):
    holding = LEGAL_WHILE_HOLDING[stage.name]
    assert Operation.WAIT in legal_operations(slot_in(stage))
    assert asked(slot_in(stage)) == holding
    for mode in (AlphaMode.UP, AlphaMode.DOWN):
        assert asked(slot_in(stage, alpha_mode=mode)) == holding - {"set_alpha_target"}
    assert asked(slot_in(stage, choices=())) == holding - {"germinate"}
    assert asked(slot_in(stage, fading=True)) == {"prune"}


def test_a_committed_slot_can_grow_again_until_its_cap():
    below = slot_in(SeedStage.FOSSILIZED, committed=1, max_committed=2)
    assert asked(below) == {"germinate"}
    assert asked(below.model_copy(update={"committed": 2})) == set()
    assert asked(below.model_copy(update={"choices": ()})) == set()


def every_action(state: GrowthState) -> list[Action]:
    """Return one action of each operation for each slot, germinations with a fitting blueprint."""
    actions: list[Action] = []
    for slot in state.slots:
        fitting = slot.choices[0].name if slot.choices else "norm"
        actions += [
            Germinate(slot=slot.path, blueprint=fitting),
            Advance(slot=slot.path),
            SetAlphaTarget(slot=slot.path, target=0.5, steps=10),
            Prune(slot=slot.path),
            Commit(slot=slot.path),
        ]
    return actions


@given(data=st.data())
def test_the_check_passes_what_is_listed_and_refuses_the_rest_naming_what_is_legal(
    growth_states: st.SearchStrategy[GrowthState], data: st.DataObject
):
    state = data.draw(growth_states)
    listed = legal_actions(state)
    assert listed[0] == LegalAction(operation=Operation.WAIT)
    assert len(set(listed)) == len(listed)
    check_action(state, Wait())
    passed = [listed[0]]
    for action in every_action(state):
        legal = LegalAction(operation=action.operation, slot=action.slot)
        if legal in listed:
            check_action(state, action)
            passed.append(legal)
            continue
        slot = state.slot(action.slot)
        with pytest.raises(IllegalAction) as refusal:
            check_action(state, action)
        message, _, named = str(refusal.value).partition("; legal: ")
        assert message.startswith(f"{action.operation} is not legal for slot '{slot.path}'")
        assert slot.stage.name in message
        assert ("fading out" in message) == slot.fading
        assert set(named.split(", ")) == {"wait", *asked(slot)}
    assert passed == list(listed)


def test_an_unknown_slot_or_a_blueprint_that_does_not_fit_is_refused_with_the_alternatives():
    state = GrowthState(epoch=1, step=10, slots=(slot_in(SeedStage.DORMANT),))
    with pytest.raises(IllegalAction, match=r"no slot 'layer9'; slots: 'layer2'"):
        check_action(state, Prune(slot="layer9"))
    with pytest.raises(IllegalAction, match=r"'lora' does not fit slot 'layer2'; fitting: norm"):
        check_action(state, Germinate(slot="layer2", blueprint="lora"))
    # A slot knows what fits without options, and tells of the rest when it builds.
    check_action(state, Germinate(slot="layer2", blueprint="lora", options={"rank": 2}))
    with pytest.raises(IllegalAction, match=r"no slot 'a'; slots: none"):
        GrowthState(epoch=1, step=10).slot("a")


TEXT = st.text(max_size=8)
STEPS = st.integers(0, 10**9)
SCALAR = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1.0, 1.0) | TEXT
OPTION = SCALAR | st.lists(SCALAR, max_size=2) | st.dictionaries(TEXT, SCALAR, max_size=2)
BY_TYPE = {
    Wait: st.builds(Wait),
    Germinate: st.builds(
        Germinate,
        slot=TEXT,
        blueprint=TEXT,
        options=st.dictionaries(TEXT, OPTION, max_size=3),
        blend_operator=st.none() | st.sampled_from(BlendOperator),
    ),
    Advance: st.builds(
        Advance,
        slot=TEXT,
        ramp_steps=st.none() | STEPS,
        ramp_curve=st.none() | st.sampled_from(AlphaCurve),
    ),
    SetAlphaTarget: st.builds(
        SetAlphaTarget,
        slot=TEXT,
        target=st.floats(0.0, 1.0),
        steps=STEPS,
        curve=st.sampled_from(AlphaCurve),
    ),
    Prune: st.builds(Prune, slot=TEXT, over_steps=STEPS, reason=TEXT),
    Commit: st.builds(Commit, slot=TEXT),
}


def test_every_operation_has_one_action_type():
    union, _ = get_args(Action)
    assert set(get_args(union)) == set(BY_TYPE)
    assert [action.model_fields["operation"].default for action in BY_TYPE] == list(Operation)


@pytest.mark.parametrize("action_type", BY_TYPE, ids=lambda action_type: action_type.__name__)
@settings(max_examples=50)
@given(data=st.data())
def test_an_action_survives_json(action_type: type[Action], data: st.DataObject):
    action = data.draw(BY_TYPE[action_type])
    back = parse_action(action.model_dump_json())
    assert type(back) is action_type
    assert back == action


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"operation": "grow", "slot": "a"}, "grow"),
        ({"slot": "a"}, "operation"),
        ({"operation": "prune"}, "slot"),
        ({"operation": "prune", "slot": "a", "hard": True}, "hard"),
        ({"operation": "wait", "slot": "a"}, "slot"),
        ({"operation": "prune", "slot": "a", "over_steps": -1}, "over_steps"),
        ({"operation": "advance", "slot": "a", "ramp_curve": "cubic"}, "ramp_curve"),
        ({"operation": "set_alpha_target", "slot": "a", "target": 1.01, "steps": 1}, "target"),
        ({"operation": "set_alpha_target", "slot": "a", "target": "NaN", "steps": 1}, "target"),
        ({"operation": "set_alpha_target", "slot": "a", "target": 1.0, "steps": -1}, "steps"),
    ],
)
def test_a_malformed_action_is_refused_by_the_name_of_what_is_wrong(
    document: dict[str, object], named: str
):
    with pytest.raises(ValidationError, match=named):
        parse_action(json.dumps(document))


def test_actions_are_values():
    action = Prune(slot="a")
    with pytest.raises(ValidationError, match="frozen"):
        action.over_steps = 3
    assert Germinate(slot="a", blueprint="b").options is not (
        Germinate(slot="a", blueprint="b").options
    )
