"""The story that a run's events tell."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.actions import Germinate, Prune
from esper.lifecycle.events import (
    CheckpointDamaged,
    Event,
    EventRecord,
    GateEvaluated,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    RunWentBack,
    SeedCompiled,
    SeedGerminated,
    SinkLossesCounted,
    TwinFinished,
)
from esper.lifecycle.gates import Gate, GateResult, compare
from esper.lifecycle.stages import GROWTH_PATH, SeedStage
from esper.lifecycle.words import refused_for
from esper.report import RunStory, tell
from esper.report.story import GateVisit, SeedStory
from esper.telemetry import RunReader
from growth_problem import make_problem


def test_each_seed_has_its_outcome_and_the_reason(story: RunStory) -> None:
    committed, refused, growing = story.seeds
    assert [seed.blueprint for seed in story.seeds] == ["mlp", "noop", "lora"]
    assert [seed.outcome for seed in story.seeds] == ["committed", "pruned", "still growing"]
    assert committed.reason == "passed G5"
    assert refused.reason.startswith("G2 refused: gradient_ratio 0, needs >= 0.0001")
    assert growing.reason.startswith("G2 refused") or growing.reason == "TRAINING"
    assert committed.contribution_fraction is not None
    assert committed.contribution_fraction > 0.3
    assert story.committed == [committed]
    assert story.host_param_count == 97


def test_committed_seed_passed_every_stage_and_gate_in_order(story: RunStory) -> None:
    seed = story.seeds[0]
    assert [visit.stage for visit in seed.stages] == list(GROWTH_PATH[1:-1])
    passed = [visit.event.result.gate for visit in seed.gates if visit.event.result.passed]
    assert passed == list(Gate)
    assert [visit.step for visit in seed.stages] == sorted(visit.step for visit in seed.stages)
    assert seed.end_epoch is not None
    assert seed.epoch < seed.end_epoch


def test_every_seed_begins_with_its_own_birth(story: RunStory) -> None:
    """Also one behind a committed seed, whose last stage is told after its commit."""
    assert [seed.stages[0].stage for seed in story.seeds] == [SeedStage.GERMINATED] * 3
    assert [seed.gates[0].event.result.gate for seed in story.seeds] == [Gate.G0] * 3


def test_what_is_measured_for_a_decision_has_its_epoch(story: RunStory) -> None:
    decided = {visit.step: visit.epoch for seed in story.seeds for visit in seed.gates}
    measured = [
        visit for seed in story.seeds for visit in [*seed.contributions, *seed.gradient_ratios]
    ]
    together = [visit for visit in measured if visit.step in decided]
    assert any(seed.contributions for seed in story.seeds)
    assert len(together) > 2
    assert [visit.epoch for visit in together] == [decided[visit.step] for visit in together]


def test_story_can_be_told_of_any_prefix_of_the_events(run_folder: Path) -> None:
    records = RunReader(run_folder).events()
    for length in range(len(records)):
        story = tell(records[:length])
        assert len(story.seeds) <= 3


def test_a_run_that_did_not_say_how_it_began_has_the_slots_that_grew(run_folder: Path) -> None:
    """As one in somebody's own loop, whose folder has what growth tells only."""
    records = RunReader(run_folder).events()
    story = tell([record for record in records if not isinstance(record.event, RunStarted)])
    assert story.slots == ("embed",)
    assert (story.host_param_count, story.param_counts) == (None, [])
    assert [seed.outcome for seed in story.seeds] == ["committed", "pruned", "still growing"]


def told_of_a_seed(*, bad_after: int | None = None, snapshot_steps: int = 10) -> list[EventRecord]:
    """Return what a run tells of a seed that germinates at step 32 and is pruned at step 64.

    Args:
        bad_after: Three steps in a row are bad from there on, once.
        snapshot_steps: Between two states that the run can go back to.
    """
    problem = make_problem()
    bad = {"left": 0 if bad_after is None else 3}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = mse_loss(output, target)
        if bad["left"] and torch.is_grad_enabled() and trainer.growth.step >= (bad_after or 0):
            bad["left"] -= 1
            return value * math.nan
        return value

    policy = esper.PlannedPolicy(
        {
            2: [Germinate(slot="embed", blueprint="mlp")],
            4: [Prune(slot="embed", over_steps=0, reason="seen enough")],
        }
    )
    governor = {"snapshot_steps": snapshot_steps, "history_steps": 8}
    trainer = problem.trainer(policy, epochs=6, loss=loss, governor=governor)
    trainer.fit()
    return problem.recorder.records


@pytest.mark.parametrize(
    ("bad_after", "snapshot_steps", "to_step", "outcomes"),
    [
        (35, 10, 30, []),
        (40, 16, 32, ["still growing"]),  # from before the decision, which is the next to be told
        (70, 10, 60, ["still growing"]),
    ],
)
def test_what_a_run_has_gone_back_behind_is_no_part_of_its_story(
    bad_after: int, snapshot_steps: int, to_step: int, outcomes: list[str]
) -> None:
    records = told_of_a_seed(bad_after=bad_after, snapshot_steps=snapshot_steps)
    (went_back,) = (i for i, r in enumerate(records) if isinstance(r.event, RunWentBack))
    assert records[went_back].event.to_step == to_step
    there = tell(records[: went_back + 1])
    assert [seed.outcome for seed in there.seeds] == outcomes
    assert all(visit.step <= to_step for seed in there.seeds for visit in seed.stages)

    def lives(story: RunStory) -> list[object]:
        return [(s.step, s.outcome, s.end_step, s.stages, len(s.ramps)) for s in story.seeds]

    story, untouched = tell(records), tell(told_of_a_seed())
    assert lives(story) == lives(untouched)
    assert lives(story)[0][:3] == (32, "pruned", 64)
    assert story.stages == untouched.stages
    assert story.param_counts == untouched.param_counts
    assert [met.step for met in story.interventions][-1] > to_step, "is told as what happened"


@pytest.mark.parametrize(("bad_after", "snapshot_steps"), [(35, 10), (40, 16)])
def test_a_seed_is_compiled_once_however_often_the_run_goes_back_behind_that(
    bad_after: int, snapshot_steps: int
) -> None:
    records = []
    for record in told_of_a_seed(bad_after=bad_after, snapshot_steps=snapshot_steps):
        records.append(record)
        if isinstance(record.event, SeedGerminated):
            compiled = SeedCompiled(
                slot="embed",
                blueprint="mlp",
                kinds=2,
                checked=True,
                source="store",
                milliseconds=1.0,
            )
            records.append(record.model_copy(update={"event": compiled}))
    assert sum(isinstance(record.event, SeedCompiled) for record in records) == 2
    (seed,) = tell(records).seeds
    assert len(seed.compiled) == 1


TWIN = TwinFinished(
    metrics={"loss": 0.5}, param_count=1, epochs=1, shared_steps=1, flops_fraction=1.0
)


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([], None),
        ([(5.0, RunStarted(slots=(), host_param_count=1))], 0.0),
        (
            [
                (5.0, RunStarted(slots=(), host_param_count=1)),
                (65.0, RunFailed(error="no")),
                (50_000.0, CheckpointDamaged(name="step-2", error="no")),
                (50_001.0, RunResumed(name="step-1")),
                (50_031.0, RunFinished(metrics={"loss": 0.5}, param_count=1)),
                (50_131.0, TWIN),
                (50_132.0, SinkLossesCounted(sink="WandbSink", lost_calls=1)),
            ],
            90.0,
        ),
    ],
)
def test_a_run_took_neither_the_time_of_its_pauses_nor_that_of_its_twin(
    events: list[tuple[float, Event]], seconds: float | None
) -> None:
    records = [
        EventRecord(time_seconds=time, epoch=1, step=1, event=event) for time, event in events
    ]
    assert tell(records).seconds == seconds


def test_a_seed_that_was_taken_out_for_another_reason_than_a_refusal_has_that_one() -> None:
    (seed,) = tell(told_of_a_seed()).seeds
    assert not seed.gates[-1].event.result.passed, "a gate has refused it before"
    assert seed.reason == seed.pruned_because == "seen enough"


@pytest.mark.parametrize(
    ("contribution", "linear", "told"),
    [(0.1, 1.0, True), (0.0, 1.0, False), (0.0, 0.5, False), (0.1, 0.5, False)],
)
def test_a_seed_was_refused_as_linear_only_where_nothing_else_was_wrong_with_it(
    contribution: float, linear: float, told: bool
) -> None:
    checks = (
        compare("contribution_fraction", contribution, ">=", 0.01),
        compare("linear_share", linear, "<=", 0.99),
        compare("over_linear_fraction", contribution * (1.0 - linear), ">=", 0.02),
    )
    judged = GateEvaluated(
        slot="0",
        blueprint="mlp",
        to_stage=SeedStage.PROBATIONARY,
        result=GateResult(gate=Gate.G4, checks=checks),
    )
    seed = SeedStory(
        slot="0",
        blueprint="mlp",
        param_count=1,
        epoch=1,
        step=1,
        gates=[GateVisit(epoch=2, step=2, event=judged)],
        pruned_because=refused_for(6, SeedStage.SHADOWING),
    )
    assert seed.refused_as_linear == told
