"""Events in words, as a terminal and the bus tell them."""

import pytest

from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import (
    ActionApplied,
    BreakerChanged,
    Event,
    EventRecord,
    GateEvaluated,
    SeedCommitted,
    StageChanged,
)
from esper.lifecycle.gates import (
    GATE_INTO,
    Gate,
    GateInputs,
    GateResult,
    GateThresholds,
    compare,
    evaluate_gate,
)
from esper.lifecycle.notable import in_words, notable
from esper.lifecycle.stages import GROWTH_PATH, SeedStage
from esper.lifecycle.words import CHECKS, refusal
from growth_problem import make_problem


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
    assert notable(record, "decision") == f"decision 3: norm committed in stage1, {told}"


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


def gate_into_trial(linear_share: float, *, forced: bool = False) -> GateEvaluated:
    check = compare("linear_share", linear_share, "<=", 0.99)
    result = GateResult(gate=Gate.G4, checks=(check,), forced=forced)
    return GateEvaluated(
        slot="fc", blueprint="norm", to_stage=SeedStage.PROBATIONARY, result=result
    )


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            gate_into_trial(0.9922),
            "norm in fc: G4 refused: linear_share 0.9922, needs <= 0.99",
        ),
        (
            gate_into_trial(0.9922, forced=True),
            "norm in fc: G4 refused: linear_share 0.9922, needs <= 0.99; it was forced",
        ),
        (gate_into_trial(0.5), "norm in fc passed G4"),
        (
            StageChanged(
                slot="fc",
                blueprint="norm",
                from_stage=SeedStage.SHADOWING,
                to_stage=SeedStage.PROBATIONARY,
            ),
            "norm in fc went from SHADOWING to PROBATIONARY",
        ),
        (
            StageChanged(
                slot="fc",
                blueprint=None,
                from_stage=SeedStage.RESETTING,
                to_stage=SeedStage.DORMANT,
            ),
            "fc went from RESETTING to DORMANT",
        ),
        (
            ActionApplied(action=Germinate(slot="fc", blueprint="norm")),
            "germinate fc norm was carried out",
        ),
        (
            BreakerChanged(breaker="norm", from_state="open", to_state="half_open", failures=3),
            "breaker_changed: breaker=norm, from_state=open, to_state=half_open, failures=3",
        ),
    ],
)
def test_an_event_is_words_to_a_person_and_exact_to_a_program(event: Event, words: str) -> None:
    assert str(event) == words
    assert repr(event).startswith(f"{type(event).__name__}(type=")


def test_what_methods_of_a_slot_return_reads_as_sentences() -> None:
    slot = make_problem().slots["embed"]
    told = [*slot.germinate("mlp"), *slot.advance(), *slot.advance(), *slot.prune()]
    lines = "\n".join(map(str, told))
    assert "mlp in embed: G2 refused: training_steps 0, needs >= 40; " in lines
    assert "mlp in embed went from TRAINING to PRUNED" in lines
    assert not any(f"{event.type}: " in lines for event in told), lines
