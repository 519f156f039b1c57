"""What Python's logging is told of a run."""

import logging

import pytest

from esper.lifecycle.events import (
    Event,
    GateEvaluated,
    GradientHealthMeasured,
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
    assert caplog.messages[0] == f"decision 1: {germinated}"
    assert caplog.messages[-1] == f"decision 7: {committed}"
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
        "decision 0: mlp in fc: G4 refused: a 0, needs >= 1; b 0, needs >= 1",
        "decision 2: mlp in fc: G4 refused: a 0.5, needs >= 1",
        "decision 5: mlp in fc: G4 refused: a 0.5, needs >= 1",
    ]


def health(ratio: float, *, nonfinite_steps: int = 0) -> GradientHealthMeasured:
    return GradientHealthMeasured(
        slot="fc",
        host_norm=1.0,
        seed_norm=ratio,
        ratio=ratio,
        nonfinite_steps=nonfinite_steps,
        vanishing=False,
        exploding=ratio > 1000.0,
    )


def test_a_gradient_that_is_not_as_it_should_be_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = LogSink()
    for epoch, event in enumerate(
        [health(2e4), health(3e4), health(1.0), health(4e4), health(5e4, nonfinite_steps=3)]
    ):
        sink.publish(record(1, event, epoch))
    assert {level for _, level, _ in caplog.record_tuples} == {WARNING}
    grown = "the gradient of the seed in fc is"
    assert caplog.messages == [
        f"decision 0: {grown} 2e+04 times the host's",
        f"decision 3: {grown} 4e+04 times the host's",
        f"decision 4: {grown} 5e+04 times the host's and was not finite in 3 steps",
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
