"""What Python's logging is told of a run."""

import logging

import pytest

from esper.lifecycle.events import (
    Event,
    GateEvaluated,
    IsolationViolated,
    RunWentBack,
    SeedCommitted,
    SeedFailed,
    SeedGerminated,
    StageChanged,
    StepSkipped,
)
from esper.lifecycle.gates import Gate, GateResult, compare
from esper.lifecycle.stages import SeedStage
from esper.telemetry import LogSink
from tracked_run import growing, record

INFO, WARNING = logging.INFO, logging.WARNING


@pytest.fixture(autouse=True)
def _all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(INFO, logger="esper")


def refused(**failing: float) -> GateEvaluated:
    checks = tuple(compare(name, value, ">=", 1.0) for name, value in failing.items())
    result = GateResult(gate=Gate.G4, checks=(*checks, compare("passes", 2.0, ">=", 1.0)))
    return GateEvaluated(slot="fc", blueprint="mlp", to_stage=SeedStage.PROBATIONARY, result=result)


def test_a_run_is_told_by_its_notable_events_and_nothing_by_the_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem, trainer = growing([LogSink()], epochs=8)
    trainer.fit()
    told = [("esper", INFO, line) for line in caplog.messages]
    assert caplog.record_tuples == told
    (germinated, committed) = problem.recorder.of(SeedGerminated, SeedCommitted)
    assert caplog.messages[0] == f"epoch 1: {germinated}"
    assert caplog.messages[-1] == f"epoch 7: {committed}"
    assert len(told) < 10 < trainer.growth.step


def test_a_refusal_is_told_again_only_when_something_has_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = LogSink()
    pruned = StageChanged(
        slot="fc", blueprint="mlp", from_stage=SeedStage.SHADOWING, to_stage=SeedStage.PRUNED
    )
    both, still_both = refused(a=0, b=0), refused(a=0.5, b=0.5)
    first, still_first = refused(a=0.5), refused(a=0)
    for epoch, event in enumerate([both, still_both, first, still_first, pruned, first]):
        sink.publish(record(1, event, epoch))
    assert caplog.messages == [
        "epoch 0: mlp in fc: G4 refused: a 0, needs >= 1; b 0, needs >= 1",
        "epoch 2: mlp in fc: G4 refused: a 0.5, needs >= 1",
        "epoch 5: mlp in fc: G4 refused: a 0.5, needs >= 1",
    ]


@pytest.mark.parametrize(
    "event",
    [
        SeedFailed(slot="fc", blueprint="mlp", error="ValueError: no"),
        StepSkipped(reason="the loss is nan", value=1.0),
        RunWentBack(from_step=9, to_step=5, same_batches=True),
        IsolationViolated(slot="fc", blueprint="mlp", reached={"a": 1.0}, num_reached=1),
    ],
    ids=lambda event: event.type,
)
def test_failures_warn(event: Event, caplog: pytest.LogCaptureFixture) -> None:
    LogSink("mine").publish(record(12, event))
    ((name, level, _),) = caplog.record_tuples
    assert (name, level) == ("mine", WARNING)
