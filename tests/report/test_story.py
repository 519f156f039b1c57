"""The story that a run's events tell."""

from pathlib import Path

from esper.lifecycle.gates import Gate
from esper.lifecycle.stages import GROWTH_PATH, SeedStage
from esper.report import RunStory, tell
from esper.telemetry import RunReader


def test_each_seed_has_its_outcome_and_the_reason(story: RunStory) -> None:
    committed, refused, growing = story.seeds
    assert [seed.blueprint for seed in story.seeds] == ["mlp", "noop", "lora"]
    assert [seed.outcome for seed in story.seeds] == ["committed", "pruned", "still growing"]
    assert committed.reason == "passed G5"
    assert refused.reason.startswith("G2 refused: gradient_ratio 0 >= 0.0001")
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
