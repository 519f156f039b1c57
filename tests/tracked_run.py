"""What trackers are given in their tests: a short run told by hand, and one that grows."""

import math
from typing import Any

import esper
from esper.lifecycle.actions import Germinate
from esper.lifecycle.alpha import AlphaCurve
from esper.lifecycle.events import (
    AlphaTargetReached,
    AlphaTargetSet,
    ContributionMeasured,
    Event,
    EventRecord,
    GradientHealthMeasured,
    RunFinished,
    RunStarted,
    SeedCommitted,
    SeedPruned,
    StageChanged,
    StepSkipped,
)
from esper.lifecycle.stages import SeedStage
from esper.telemetry import Sink
from growth_problem import LENIENT, TEST_CONFIG, Problem, make_problem

CONFIG: dict[str, Any] = {"task": "quadratic", "threads": None, "trainer": {"epochs": 3}}
SLOT = "layer.0"


def record(step: int, event: Event, epoch: int = 1) -> EventRecord:
    return EventRecord(time_seconds=1000.0 + step, epoch=epoch, step=step, event=event)


def stage(step: int, before: SeedStage, after: SeedStage) -> EventRecord:
    changed = StageChanged(slot=SLOT, blueprint="norm", from_stage=before, to_stage=after)
    return record(step, changed)


def health(step: int) -> EventRecord:
    measured = GradientHealthMeasured(
        slot=SLOT,
        host_norm=2.0,
        seed_norm=1.0,
        ratio=0.5,
        nonfinite_steps=0,
        vanishing=False,
        exploding=False,
    )
    return record(step, measured)


def contribution(step: int, saved: float) -> EventRecord:
    measured = ContributionMeasured(
        slot=SLOT,
        stage=SeedStage.PROBATIONARY,
        loss_with=1.0,
        loss_without=1.1,
        contribution_fraction=saved,
        standard_error_fraction=None,
    )
    return record(step, measured)


def alpha_set(step: int, target: float = 1.0) -> EventRecord:
    ramp = AlphaTargetSet(
        slot=SLOT, from_alpha=0.0, target=target, steps=4, curve=AlphaCurve.LINEAR
    )
    return record(step, ramp)


def alpha_reached(step: int, alpha: float = 1.0) -> EventRecord:
    return record(step, AlphaTargetReached(slot=SLOT, alpha=alpha))


STARTED = record(0, RunStarted(slots=(SLOT,), host_param_count=97), epoch=0)
FINISHED = record(30, RunFinished(metrics={"loss": 0.25}, param_count=120), epoch=3)
SKIPPED = record(12, StepSkipped(reason="bad loss", value=math.nan))
PRUNED = record(
    20, SeedPruned(slot=SLOT, blueprint="norm", from_stage=SeedStage.BLENDING, reason="no use")
)
COMMITTED = record(
    20, SeedCommitted(slot=SLOT, blueprint="norm", param_count=23, contribution_fraction=0.1)
)


def tell_run(sink: Sink, *events: EventRecord) -> None:
    """Tell a sink of three epochs, the second one with a NaN, and of a seed in between."""
    sink.publish(STARTED)
    sink.measure(1, 10, {"loss": 1.0})
    sink.flush()
    for event in (
        stage(10, SeedStage.TRAINING, SeedStage.BLENDING),
        alpha_set(10),
        SKIPPED,
        alpha_reached(14),
        health(20),
        contribution(20, 0.1),
        *events,
    ):
        sink.publish(event)
    sink.measure(2, 20, {"loss": math.nan, "top-5 %": 0.5})
    sink.flush()
    sink.measure(3, 30, {"loss": 0.5})
    sink.publish(FINISHED)
    sink.flush()


def growing(sinks: list[Sink], *, epochs: int = 6) -> tuple[Problem, esper.Trainer]:
    """Return a problem that grows, and its trainer."""
    config = TEST_CONFIG.model_copy(
        update={"thresholds": TEST_CONFIG.thresholds.model_copy(update=LENIENT)}
    )
    problem = make_problem(config=config)
    policy = esper.PlannedPolicy({1: [Germinate(slot="embed", blueprint="mlp")]})
    trainer = problem.trainer(policy, epochs=epochs)
    trainer.growth.sinks.extend(sinks)
    return problem, trainer
