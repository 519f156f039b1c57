"""Events in words, as a terminal and the bus tell them."""

import pytest

from esper.lifecycle.events import EventRecord, GateEvaluated, SeedCommitted
from esper.lifecycle.gates import (
    GATE_INTO,
    Gate,
    GateInputs,
    GateResult,
    GateThresholds,
    evaluate_gate,
)
from esper.lifecycle.stages import GROWTH_PATH, SeedStage
from esper.lifecycle.words import CHECKS, in_words, notable, refusal


@pytest.mark.parametrize(
    ("fraction", "told"),
    [
        (0.0123, "saves at least +1.2% of the loss"),
        (0.0, "saves at least +0.0% of the loss"),
        (-0.2, "saves at least -20.0% of the loss"),
        (None, "what it saves was never weighed"),
    ],
)
def test_a_commit_tells_what_the_seed_saves_or_that_nobody_weighed_it(
    fraction: float | None, told: str
) -> None:
    event = SeedCommitted(
        slot="stage1", blueprint="norm", param_count=8, contribution_fraction=fraction
    )
    record = EventRecord(time_seconds=0.0, epoch=3, step=60, event=event)
    assert in_words(record) == f"norm committed in stage1, {told}"
    assert notable(record) == f"epoch 3: norm committed in stage1, {told}"


@pytest.mark.parametrize(
    ("gate", "inputs", "told"),
    [
        (
            Gate.G4,
            {"contribution_fraction": 0.2, "linear_share": 0.5, "over_linear_fraction": 0.002428},
            "over_linear_fraction 0.002428, needs >= 0.02; "
            "loss_increase_fraction not measured, needs <= 0.1",
        ),
        (
            Gate.G1,
            {"prewarmed": True, "isolation_leaks": 2},
            "breaker_closed not measured, needs 1",
        ),
    ],
)
def test_a_refusal_tells_what_was_needed_and_nothing_that_holds(
    gate: Gate, inputs: dict[str, float], told: str
) -> None:
    result = evaluate_gate(gate, GateInputs(live=True, **inputs), GateThresholds())
    words = refusal(result)
    assert words.startswith(f"{gate} refused: {told}")
    assert words.count("needs") == len(result.failures)


def test_every_check_of_a_gate_is_explained() -> None:
    limits = GateThresholds(max_step_time_ratio=1.5)
    names = {
        check.name
        for gate in Gate
        for live in (True, False)
        for check in evaluate_gate(gate, GateInputs(live=live), limits).checks
    }
    assert names == set(CHECKS)


def test_each_gate_is_told_on_a_seeds_way_into_the_forward_path_and_to_its_trial() -> None:
    """A commit, behind G5, is told itself; what comes before G2 goes with germination."""
    told = []
    for after in GROWTH_PATH[1:]:
        passed = GateResult(gate=GATE_INTO[after], checks=())
        event = GateEvaluated(slot="stage1", blueprint="norm", to_stage=after, result=passed)
        words = in_words(EventRecord(time_seconds=0.0, epoch=3, step=60, event=event))
        if words is not None:
            told.append((after, words.removeprefix("norm in stage1 passed ")))
    assert told == [
        (SeedStage.BLENDING, "G2"),
        (SeedStage.SHADOWING, "G3"),
        (SeedStage.PROBATIONARY, "G4"),
    ]
