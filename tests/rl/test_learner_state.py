"""A policy's training: what it reports, keeps and goes on from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from esper.rl.learner_state import LearnerStateError, LearnerStates
from esper.rl.policy_training import (
    PolicyDivergedError,
    PolicyTraining,
    PolicyTrainingConfig,
)
from esper.rl.training_report import TrainingReport
from esper.rl.workers import InProcessWorkers
from rl_toys import EPISODE_STEPS, SETTINGS, CueEnv, Failing

CONFIG = PolicyTrainingConfig(
    num_workers=2,
    steps_per_fragment=2 * EPISODE_STEPS,
    total_steps=4 * 2 * 2 * EPISODE_STEPS,
    batch_size=6,
    num_epochs=2,
    random_seed=5,
)
ROLLOUT = CONFIG.steps_per_rollout


def training(
    keep: Path | None = None,
    *,
    make_env: Any = CueEnv,
    hidden_size: int = 4,
    sinks: Any = (),
    **changes: Any,
) -> PolicyTraining:
    config = PolicyTrainingConfig(**{**CONFIG.model_dump(), **changes})
    options = {**SETTINGS.policy_options, "lstm_hidden_size": hidden_size}
    settings = config.collection(SETTINGS.policy, options)
    workers = InProcessWorkers(make_env, settings, num_workers=config.num_workers)
    return PolicyTraining(config, settings, CueEnv, workers, sinks=sinks, keep=keep)


def learned(of: PolicyTraining) -> dict[str, torch.Tensor]:
    state = of.learner.state_dict()
    moments = {
        f"{name}.{key}": value
        for name, kept in state["optimizer"]["state"].items()
        for key, value in kept.items()
    }
    return {**state["policy"], **moments}


def without_seconds(reports: list[TrainingReport]) -> list[dict[str, Any]]:
    clocks = {"seconds", "collect_seconds", "steps_per_second"}
    return [report.model_dump(exclude=clocks) for report in reports]


def test_a_training_that_goes_on_is_to_the_bit_the_one_without_a_break(tmp_path: Path) -> None:
    straight = training()
    expected = list(straight.rollouts())
    first = list(training(tmp_path, total_steps=2 * ROLLOUT).rollouts())
    torch.manual_seed(99)
    resumed = training(tmp_path)
    assert resumed.resume() == 2 * ROLLOUT
    second = list(resumed.rollouts())
    assert len(first) == len(second) == 2
    for name, value in learned(straight).items():
        assert torch.equal(value, learned(resumed)[name]), name
    ignored = {"total_steps": 0}
    assert [{**told, **ignored} for told in without_seconds([*first, *second])] == [
        {**told, **ignored} for told in without_seconds(expected)
    ]
    assert resumed.learner.state_dict()["recent_episodes"][0]["l"] == EPISODE_STEPS
    assert len(resumed.learner.state_dict()["recent_episodes"]) == 4 * 2 * 2


class Taken:
    def __init__(self) -> None:
        self.taken: list[tuple[int, int, Mapping[str, float]]] = []

    def publish(self, record: Any) -> None:
        raise AssertionError(record)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        self.taken.append((epoch, step, metrics))

    def flush(self) -> None:
        """Nothing is kept back."""


def test_each_rollout_is_reported_and_measured(tmp_path: Path) -> None:
    sink = Taken()
    failing = Failing(("raise",), tmp_path)
    reports = list(training(make_env=failing, sinks=[sink], total_steps=2 * ROLLOUT - 1).rollouts())
    assert [(epoch, step) for epoch, step, _ in sink.taken] == [(1, ROLLOUT), (2, 2 * ROLLOUT)]
    first, second = reports
    assert first.episodes == 4
    assert first.mean_episode_steps == EPISODE_STEPS
    assert first.mean_return == pytest.approx(sum(first.return_parts.values()), abs=1e-5)
    assert first.final.keys() == {"cue", "threads"}
    assert 0.0 < first.entropy < math.log(6) + 1e-6
    assert first.problems == ("worker 0: ValueError: reward component 'progress' is nan",)
    assert (first.restarts, second.restarts, second.problems) == (1, 1, ())
    metrics = sink.taken[0][2]
    assert metrics["return/named"] == first.return_parts["named"]
    assert metrics["final/cue"] == first.final["cue"]
    assert metrics["approx_kl"] == first.approx_kl
    assert all(isinstance(value, float) for value in metrics.values())
    assert TrainingReport.from_dump(first.model_dump(mode="json")) == first


def test_a_damaged_state_is_passed_over_and_told(tmp_path: Path) -> None:
    list(training(tmp_path, total_steps=3 * ROLLOUT).rollouts())
    names = LearnerStates(tmp_path).names()
    assert names == ["rollout-00000002", "rollout-00000003"]
    weights = tmp_path / names[-1] / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = training(tmp_path)
    assert resumed.resume() == 2 * ROLLOUT
    (told,) = next(resumed.rollouts()).problems
    assert "rollout-00000003/state.safetensors was changed" in told


@pytest.mark.parametrize("how", ["changed", "lost"])
def test_a_state_whose_manifest_is_damaged_is_passed_over_and_written_anew(
    how: str, tmp_path: Path
) -> None:
    list(training(tmp_path, total_steps=2 * ROLLOUT).rollouts())
    manifest = tmp_path / "rollout-00000002" / "manifest.json"
    if how == "changed":
        manifest.write_text("{}", encoding="utf-8")
    else:
        manifest.unlink()
    resumed = training(tmp_path, total_steps=2 * ROLLOUT)
    assert resumed.resume() == ROLLOUT
    (report,) = resumed.rollouts()
    (problem,) = report.problems
    assert "manifest.json is" in problem
    assert training(tmp_path).resume() == 2 * ROLLOUT


def test_what_people_put_beside_the_states_is_none_of_them(tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("rollout-00000001 (copy)", "rollout-good")]
    for copy in copies:
        copy.mkdir(parents=True)
    reports = list(training(tmp_path).rollouts())
    assert len(reports) > 2
    assert all(copy.is_dir() for copy in copies)
    assert LearnerStates(tmp_path).newest().info.num_rollouts == len(reports)


def test_nothing_to_go_on_from_is_told(tmp_path: Path) -> None:
    with pytest.raises(LearnerStateError, match="there is none"):
        training(tmp_path).resume()
    with pytest.raises(ValueError, match="no folder was given"):
        training().resume()


def test_other_settings_or_another_policy_are_refused(tmp_path: Path) -> None:
    list(training(tmp_path, total_steps=ROLLOUT).rollouts())
    with pytest.raises(ValueError, match=r"had gamma 1\.0 \(now 0\.9\)"):
        training(tmp_path, gamma=0.9).resume()
    with pytest.raises(ValueError, match="state of another policy"):
        training(tmp_path, hidden_size=5).resume()


def test_a_state_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    keep = tmp_path / "taken"
    keep.write_text("by a file", encoding="utf-8")
    reports = list(training(keep, total_steps=2 * ROLLOUT).rollouts())
    assert [len(report.problems) for report in reports] == [1, 1]
    assert "the state was not kept" in reports[0].problems[0]


def test_weights_that_diverge_are_told_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(PolicyDivergedError, match="learning_rate below 1e"):
        list(training(tmp_path, learning_rate=1e37, max_gradient_norm=1e30).rollouts())
    assert LearnerStates(tmp_path).names() == []


def test_a_batch_of_one_step_is_refused() -> None:
    with pytest.raises(ValidationError, match="leaves a batch of one step"):
        PolicyTrainingConfig(num_workers=3, steps_per_fragment=43, batch_size=64)


def test_another_number_of_workers_is_refused() -> None:
    settings = CONFIG.collection(SETTINGS.policy, SETTINGS.policy_options)
    workers = InProcessWorkers(CueEnv, settings, num_workers=1)
    with pytest.raises(ValueError, match="num_workers is 2, and 1 were made"):
        PolicyTraining(CONFIG, settings, CueEnv, workers)
