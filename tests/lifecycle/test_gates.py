"""Gates as tables at their boundaries, and what holds for all of them."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.lifecycle import (
    GATE_INTO,
    Check,
    Gate,
    GateInputs,
    GateResult,
    GateThresholds,
    SeedStage,
    evaluate_gate,
)
from esper.lifecycle.gates import compare

LIMITS = GateThresholds(
    min_training_steps=40,
    min_gradient_ratio=0.001,
    max_gradient_ratio=1000.0,
    min_line_search_gain_fraction=0.005,
    min_steps_at_target=20,
    max_loss_increase_fraction=0.1,
    min_contribution_fraction=0.01,
    max_linear_share=0.99,
    min_over_linear_fraction=0.002,
    max_step_time_ratio=4.0,
    trial_epochs=2,
)

AT_THE_EDGE = GateInputs(
    identity_error=0.0,
    shape_matches=True,
    parameters_finite=True,
    parameters_unshared=True,
    prewarmed=True,
    breaker_closed=True,
    isolation_leaks=0,
    training_steps=40,
    gradient_ratio=0.001,
    line_search_gain_fraction=0.005,
    alpha=1.0,
    steps_at_target=20,
    loss_increase_fraction=0.1,
    contribution_fraction=0.01,
    linear_share=0.99,
    over_linear_fraction=0.002,
    step_time_ratio=4.0,
    trial_contributions=(0.01, 0.01),
    trial_over_linear=(0.002, 0.002),
)
"""Passes every gate, with nothing to spare where there is a threshold."""

G0, G1, G2, G3, G4, G5 = Gate

CHECKS = {
    G0: [
        "identity_error == 0",
        "shape_matches == 1",
        "parameters_finite == 1",
        "parameters_unshared == 1",
    ],
    G1: ["prewarmed == 1", "breaker_closed == 1", "isolation_leaks == 0"],
    G2: [
        "training_steps >= 40",
        "parameters_finite == 1",
        "isolation_leaks == 0",
        "gradient_ratio >= 0.001",
        "gradient_ratio <= 1000",
        "line_search_gain_fraction >= 0.005",
    ],
    G3: [
        "alpha == 1",
        "steps_at_target >= 20",
        "loss_increase_fraction <= 0.1",
        "isolation_leaks == 0",
    ],
    G4: [
        "contribution_fraction >= 0.01",
        "linear_share <= 0.99",
        "over_linear_fraction >= 0.002",
        "loss_increase_fraction <= 0.1",
        "step_time_ratio <= 4",
        "isolation_leaks == 0",
    ],
    G5: [
        "trial_epochs >= 2",
        "worst_in_trial_window >= 0.01",
        "worst_over_linear_in_window >= 0.002",
        "loss_increase_fraction <= 0.1",
    ],
}

JUST_BEYOND = [
    (G0, "identity_error", 5e-324, "identity_error"),
    (G0, "shape_matches", False, "shape_matches"),
    (G0, "parameters_finite", False, "parameters_finite"),
    (G0, "parameters_unshared", False, "parameters_unshared"),
    (G1, "prewarmed", False, "prewarmed"),
    (G1, "breaker_closed", False, "breaker_closed"),
    (G1, "isolation_leaks", 1, "isolation_leaks"),
    (G2, "training_steps", 39, "training_steps"),
    (G2, "parameters_finite", False, "parameters_finite"),
    (G2, "isolation_leaks", 1, "isolation_leaks"),
    (G2, "gradient_ratio", math.nextafter(0.001, 0.0), "gradient_ratio"),
    (G2, "gradient_ratio", math.nextafter(1000.0, math.inf), "gradient_ratio"),
    (G2, "line_search_gain_fraction", math.nextafter(0.005, 0.0), "line_search_gain_fraction"),
    (G3, "alpha", math.nextafter(1.0, 0.0), "alpha"),
    (G3, "steps_at_target", 19, "steps_at_target"),
    (G3, "loss_increase_fraction", math.nextafter(0.1, 1.0), "loss_increase_fraction"),
    (G3, "isolation_leaks", 1, "isolation_leaks"),
    (G4, "isolation_leaks", 1, "isolation_leaks"),
    (G4, "contribution_fraction", math.nextafter(0.01, 0.0), "contribution_fraction"),
    (G4, "linear_share", math.nextafter(0.99, 1.0), "linear_share"),
    (G4, "over_linear_fraction", math.nextafter(0.002, 0.0), "over_linear_fraction"),
    (G4, "loss_increase_fraction", math.nextafter(0.1, 1.0), "loss_increase_fraction"),
    (G4, "step_time_ratio", math.nextafter(4.0, 5.0), "step_time_ratio"),
    (G5, "trial_contributions", (0.01,), "trial_epochs"),
    (G5, "trial_over_linear", (0.5, math.nextafter(0.002, 0.0)), "worst_over_linear_in_window"),
    (G5, "trial_over_linear", (math.nextafter(0.002, 0.0), 0.5), "worst_over_linear_in_window"),
    (G5, "trial_contributions", (0.5, math.nextafter(0.01, 0.0)), "worst_in_trial_window"),
    (G5, "trial_contributions", (math.nextafter(0.01, 0.0), 0.5), "worst_in_trial_window"),
    (G5, "loss_increase_fraction", math.nextafter(0.1, 1.0), "loss_increase_fraction"),
]

READ_AS_NUMBERS = [
    (G0, "identity_error"),
    (G2, "gradient_ratio"),
    (G2, "line_search_gain_fraction"),
    (G3, "alpha"),
    (G3, "loss_increase_fraction"),
    (G4, "contribution_fraction"),
    (G4, "linear_share"),
    (G4, "over_linear_fraction"),
    (G4, "loss_increase_fraction"),
    (G5, "loss_increase_fraction"),
    (G4, "step_time_ratio"),
]
MAY_BE_MISSING = sorted(
    {(gate, field) for gate, field, _, _ in JUST_BEYOND if GateInputs().model_dump()[field] is None}
)

NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
MEASURED = st.none() | st.floats() | st.integers(-3, 50).map(float)


def judge(gate: Gate, **changes: Any) -> GateResult:
    return evaluate_gate(gate, AT_THE_EDGE.model_copy(update=changes), LIMITS)


def names_of_failures(result: GateResult) -> list[str]:
    return [check.name for check in result.failures]


def test_each_stage_up_has_its_gate_and_no_other_stage_has_one():
    stages = ["GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED"]
    assert {stage.name: gate.value for stage, gate in GATE_INTO.items()} == dict(
        zip(stages, ["G0", "G1", "G2", "G3", "G4", "G5"], strict=True)
    )
    assert all(isinstance(stage, SeedStage) for stage in GATE_INTO)


@pytest.mark.parametrize("gate", Gate)
def test_a_seed_exactly_at_every_threshold_passes_and_every_check_is_listed(gate: Gate):
    result = judge(gate)
    assert result.gate is gate
    assert result.passed
    assert result.failures == ()
    listed = [f"{check.name} {check.comparison} {check.threshold:g}" for check in result.checks]
    assert listed == CHECKS[gate]


@pytest.mark.parametrize(("gate", "field", "value", "name"), JUST_BEYOND)
def test_the_smallest_step_beyond_one_threshold_fails_that_check_only(
    gate: Gate, field: str, value: object, name: str
):
    result = judge(gate, **{field: value})
    assert not result.passed
    assert names_of_failures(result) == [name]
    if field == name:
        assert result.failures[0].measured == value


@pytest.mark.parametrize(("gate", "field"), MAY_BE_MISSING)
def test_what_was_not_measured_never_passes(gate: Gate, field: str):
    result = judge(gate, **{field: None})
    assert set(names_of_failures(result)) == {field}
    assert {check.measured for check in result.failures} == {None}
    assert f"{field} not measured" in str(result)


@pytest.mark.parametrize("gate", Gate)
def test_nothing_measured_at_all_passes_no_gate(gate: Gate):
    assert not evaluate_gate(gate, GateInputs(), LIMITS).passed
    live = evaluate_gate(gate, GateInputs(live=True), LIMITS)
    assert not live.passed


@pytest.mark.parametrize(("gate", "field"), READ_AS_NUMBERS)
@given(value=NOT_FINITE)
def test_a_non_finite_measurement_never_passes_however_favourable_its_sign(
    gate: Gate, field: str, value: float
):
    result = judge(gate, **{field: value})
    assert set(names_of_failures(result)) == {field}
    assert str(result.failures[0].measured) == str(value)


@given(value=NOT_FINITE, place=st.integers(0, 1))
def test_a_non_finite_trial_measurement_in_the_window_fails(value: float, place: int):
    trial = [0.5, 0.5]
    trial[place] = value
    result = judge(G5, trial_contributions=tuple(trial))
    assert names_of_failures(result) == ["worst_in_trial_window"]
    result = judge(G5, trial_over_linear=tuple(trial))
    assert names_of_failures(result) == ["worst_over_linear_in_window"]


def test_the_trial_window_is_the_last_measurements_and_forgets_those_before():
    for trial in ("trial_contributions", "trial_over_linear"):
        assert judge(G5, **{trial: (-1.0, math.nan, 0.01, 0.01)}).passed
        assert not judge(G5, **{trial: (0.5, 0.5, 0.5, 0.0)}).passed


def test_a_live_seed_is_judged_at_blending_by_identity_and_finite_parameters_only():
    result = evaluate_gate(
        G2, GateInputs(live=True, identity_error=0.0, parameters_finite=True), LIMITS
    )
    assert result.passed
    assert [check.name for check in result.checks] == ["identity_error", "parameters_finite"]
    assert names_of_failures(judge(G2, live=True, identity_error=1e-9)) == ["identity_error"]
    assert names_of_failures(judge(G2, live=True, parameters_finite=False)) == ["parameters_finite"]


@pytest.mark.parametrize("gate", [G4, G5])
def test_a_saving_over_the_linear_map_is_asked_for_unless_told_not_to(gate: Gate):
    limits = LIMITS.model_copy(update={"min_over_linear_fraction": None})
    nothing = {"over_linear_fraction": None, "trial_over_linear": ()}
    assert not judge(gate, **nothing).passed
    result = evaluate_gate(gate, AT_THE_EDGE.model_copy(update=nothing), limits)
    assert result.passed
    assert not any("over_linear" in check.name for check in result.checks)


@pytest.mark.parametrize("gate", [G3, G4])
def test_a_live_seed_is_not_asked_for_isolation_that_it_never_had(gate: Gate):
    result = judge(gate, live=True, isolation_leaks=None)
    assert result.passed
    assert "isolation_leaks" not in {check.name for check in result.checks}


@given(
    measured=MEASURED,
    comparison=st.sampled_from([">=", "<=", "=="]),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_check_keeps_what_it_judged_and_passes_only_known_values(
    measured: float | None, comparison: Any, threshold: float
):
    check = compare("x", measured, comparison, threshold)
    assert (check.name, check.comparison, check.threshold) == ("x", comparison, threshold)
    assert str(check.measured) == str(measured)
    if measured is None or not math.isfinite(measured):
        assert not check.passed
    else:
        signs = {">=": (0, 1), "<=": (0, -1), "==": (0,)}[comparison]
        assert check.passed == (((measured > threshold) - (measured < threshold)) in signs)


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    further=st.floats(allow_nan=False, allow_infinity=False),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_better_measurement_never_turns_a_pass_into_a_failure(
    value: float, further: float, threshold: float
):
    low, high = sorted((value, further))
    assert compare("x", low, ">=", threshold).passed <= compare("x", high, ">=", threshold).passed
    assert compare("x", high, "<=", threshold).passed <= compare("x", low, "<=", threshold).passed


BETTER = {
    G2: {"training_steps": 1, "line_search_gain_fraction": 1},
    G3: {"steps_at_target": 1, "loss_increase_fraction": -1},
    G4: {
        "contribution_fraction": 1,
        "linear_share": -1,
        "over_linear_fraction": 1,
        "loss_increase_fraction": -1,
        "step_time_ratio": -1,
    },
    G5: {"loss_increase_fraction": -1},
}


@pytest.mark.parametrize(
    ("gate", "field", "sign"),
    [(gate, field, sign) for gate, fields in BETTER.items() for field, sign in fields.items()],
)
@given(values=st.tuples(st.integers(-100, 100), st.integers(-100, 100)), fine=st.booleans())
def test_the_verdict_of_a_gate_is_monotone_in_each_measurement(
    gate: Gate, field: str, sign: int, values: tuple[int, int], fine: bool
):
    edge = getattr(AT_THE_EDGE, field)
    unit = 1 if isinstance(edge, int) else (1e-3 if fine else 1.0)
    worse, better = sorted((edge + value * unit for value in values), key=lambda x: sign * x)
    assert judge(gate, **{field: worse}).passed <= judge(gate, **{field: better}).passed


@given(
    trial=st.lists(st.floats(-1.0, 1.0), max_size=5),
    place=st.integers(0, 4),
    gain=st.floats(0.0, 1.0),
)
def test_the_verdict_of_the_trial_is_monotone_in_each_contribution(
    trial: list[float], place: int, gain: float
):
    better = [value + (gain if index == place else 0.0) for index, value in enumerate(trial)]
    before = judge(G5, trial_contributions=tuple(trial))
    assert before.passed <= judge(G5, trial_contributions=tuple(better)).passed


@given(ratio=st.floats(0.0, 1e6))
def test_the_gradient_ratio_passes_inside_its_range_and_nowhere_else(ratio: float):
    assert judge(G2, gradient_ratio=ratio).passed == (0.001 <= ratio <= 1000.0)


@given(
    gate=st.sampled_from(Gate),
    inputs=st.builds(
        GateInputs,
        identity_error=MEASURED,
        shape_matches=st.none() | st.booleans(),
        parameters_finite=st.none() | st.booleans(),
        isolation_leaks=st.none() | st.integers(0, 2),
        live=st.booleans(),
        gradient_ratio=MEASURED,
        alpha=st.floats(),
        loss_increase_fraction=MEASURED,
        contribution_fraction=MEASURED,
        linear_share=MEASURED,
        over_linear_fraction=MEASURED,
        trial_contributions=st.lists(st.floats(), max_size=4).map(tuple),
        trial_over_linear=st.lists(st.floats(), max_size=4).map(tuple),
    ),
)
def test_a_gate_is_pure_and_its_verdict_is_that_of_its_checks(gate: Gate, inputs: GateInputs):
    result = evaluate_gate(gate, inputs, LIMITS)
    assert str(result) == str(evaluate_gate(gate, inputs, LIMITS))
    assert result.passed == all(check.passed for check in result.checks)
    assert len(result.failures) == sum(not check.passed for check in result.checks)
    for check in result.checks:
        if check.measured is None or not math.isfinite(check.measured):
            assert not check.passed
    back = GateResult.model_validate_json(result.model_dump_json())
    assert back.model_dump_json() == result.model_dump_json()
    assert str(back) == str(result)


def test_a_verdict_reads_as_a_sentence_with_every_value_in_it():
    result = judge(G3, steps_at_target=7, loss_increase_fraction=None)
    assert str(result) == (
        "G3 refused: alpha 1 == 1 ok; steps_at_target 7 >= 20 FAILS; "
        "loss_increase_fraction not measured <= 0.1 FAILS; isolation_leaks 0 == 0 ok"
    )
    forced = result.model_copy(update={"forced": True})
    assert not forced.passed


@pytest.mark.parametrize("field", GateThresholds.model_fields)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_threshold_is_refused(field: str, value: float):
    with pytest.raises(ValidationError, match=field):
        GateThresholds(**{field: value})


def test_a_check_against_a_non_finite_threshold_is_refused():
    for threshold in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValidationError, match="threshold"):
            compare("x", 1.0, ">=", threshold)
        with pytest.raises(ValidationError, match="threshold"):
            Check(name="x", measured=1.0, comparison=">=", threshold=threshold, passed=True)


def test_thresholds_out_of_range_or_misspelt_are_refused():
    for wrong in (
        {"min_training_steps": -1},
        {"min_gradient_ratio": -1e-9},
        {"max_step_time_ratio": -1.0},
        {"standard_errors": -0.5},
        {"trial_epochs": 0},
        {"min_trainings_steps": 4},
    ):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            GateThresholds(**wrong)
