"""A policy's training in its folder: what it is told, keeps, goes on from, and survives."""

import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diverging_task import ADDRESS
from esper.experiments.config import load_run_config
from esper.experiments.settings import SettingsError
from esper.lifecycle.events import EnvironmentRestarted
from esper.policies.learned import LearnedPolicy, load_policy
from esper.rl import demonstrations, policy_run, stored_policy_run
from esper.rl.demonstrations import Demonstration, NotImitableError
from esper.rl.learner_state import LearnerStateError
from esper.rl.policy_run import POLICY_FILE, MakeGrowthEnv, PolicyRun
from esper.rl.policy_run_config import (
    PolicyRunConfig,
    load_policy_run_config,
    policy_run_config,
)
from esper.rl.stored_policy_run import STATES_FOLDER, new_policy_run, resumed_policy_run
from esper.rl.task_runs import TaskRuns
from esper.rl.training_report import TrainingReport
from esper.rl.workers import InProcessWorkers
from esper.telemetry import RunReader
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.run_store import RunStore

TINY = (
    "trainer.epochs=2",
    "training.num_workers=2",
    "training.steps_per_fragment=4",
    "training.batch_size=4",
    "training.num_epochs=1",
    "episodes.num_runs=2",
)
"""Fragments end where episodes do: a training that goes on is the same to the bit."""
ROLLOUT = 8


def settings(*more: str, file: Path | None = None, **options: Any) -> PolicyRunConfig:
    return load_policy_run_config("digits", file, [*TINY, *more], options)


def tiny(*more: str, rollouts: int = 2) -> PolicyRunConfig:
    return settings(f"training.total_steps={rollouts * ROLLOUT}", *more)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments play here, one after another, and so do those who are imitated."""
    monkeypatch.setattr(stored_policy_run, "ProcessWorkers", InProcessWorkers)
    monkeypatch.setattr(demonstrations, "worker_pool", lambda _: ThreadPoolExecutor(1))


def trained(run: PolicyRun) -> list[TrainingReport]:
    for _ in run.imitate():
        pass
    return list(run.reports())


# What it is told


def test_a_setting_is_of_the_training_if_it_begins_with_one_of_its_sections() -> None:
    config = settings("rewards.terminal=2", "slot.ramp_steps=30", "network.width=8", "ray=local")
    assert (config.training.steps_per_fragment, config.run.trainer.epochs) == (4, 2)
    assert (config.rewards.terminal, config.run.slot.ramp_steps) == (2.0, 30)
    assert (config.network.width, config.ray, config.run.task) == (8, "local", "digits")
    assert config.run.learning_rate == 5e-3 != config.training.learning_rate, "two of that name"
    assert config.demonstrations is None
    assert settings("demonstrations.num_episodes=3").demonstrations is not None
    assert not config.run.count_flops, "as counting takes time"
    assert settings("training.num_workers=3").training.num_workers == 3
    assert load_policy_run_config("digits", None, [], {}).training.num_workers == os.cpu_count()


def test_the_file_of_a_policy_to_imitate_is_found_from_wherever() -> None:
    config = settings("demonstrations.policy=a/policy.safetensors")
    assert config.demonstrations is not None
    assert config.demonstrations.policy == str(Path("a/policy.safetensors").absolute())


def test_later_ones_win_the_file_first_and_options_last(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        "count_flops = true\nthreads = 3\nlearning_rate = 0.5\n"
        "[trainer]\nepochs = 9\nmax_gradient_norm = 2.0\n"
        "[training]\ntotal_steps = 7\nlearning_rate = 0.25\nrandom_seed = 4\n",
        encoding="utf-8",
    )
    config = settings(
        *("threads=none", "learning_rate=0.4", "training.total_steps=8", "training.random_seed=5"),
        file=file,
        trainer={"isolation_check_steps": 5},
        training={"random_seed": 6},
    )
    run, training = config.run, config.training
    assert (run.trainer.epochs, run.trainer.max_gradient_norm) == (2, 2.0)
    assert (run.count_flops, run.threads, run.learning_rate) == (True, None, 0.4)
    assert run.trainer.isolation_check_steps == 5
    assert (training.total_steps, training.learning_rate, training.random_seed) == (8, 0.25, 6)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("training.total_step=5", "'training.total_step'; did you mean 'training.total_steps'"),
        ("trainin.total_steps=5", "'trainin.total_steps'; did you mean 'training.total_steps'"),
        ("reward.terminal=5", "'reward.terminal'; did you mean 'rewards.terminal'"),
        ("trainer.epoch=5", "'trainer.epoch'; did you mean 'trainer.epochs'"),
        ("threds=5", "'threds'; did you mean 'threads'"),
        ("run.task=text", "unknown key 'run.task'"),
        ("nonsense", "a setting is key=value, got 'nonsense'"),
        ("training.gamma=0.9", "rewards.gamma 1.0: shaping leaves what is best"),
        ("rewards.gamma=0.9", "training.gamma is 1.0, and rewards.gamma 0.9"),
        ("rewards.compute_rent=1", "operations, which are not counted; add count_flops=true"),
        ("training.batch_size=7", "leaves a batch of one step"),
        ("network.width=5", "width 5 is no multiple of 4 attention heads"),
        (f"episodes.first_random_seed={2**64}", "first_random_seed: Input should be less than"),
        ("training.device=gpu", "training.device: a device is cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(setting: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        settings(setting)


def test_a_files_unknown_section_is_named_too(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[traininng]\ntotal_steps = 7\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="unknown key 'traininng'; did you mean 'training'"):
        settings(file=file)


def test_what_agrees_is_taken() -> None:
    config = settings("training.gamma=0.9", "rewards.gamma=0.9")
    assert config.training.gamma == config.rewards.gamma == 0.9
    assert settings("rewards.compute_rent=1", "count_flops=true").rewards.compute_rent == 1.0


# What it keeps


@pytest.mark.usefixtures("in_process")
def test_a_training_leaves_a_run_folder_with_the_policy_and_every_rollout(tmp_path: Path) -> None:
    config = tiny("training.random_seed=3", "demonstrations.num_episodes=2")
    config = config.model_copy(
        update={"demonstrations": config.demonstrations.model_copy(update={"passes": 3})}
    )
    with new_policy_run(config, tmp_path / "run") as run:
        assert RunReader(tmp_path / "run").status == "running"
        likelihoods = list(run.imitate())
        reports = list(run.reports())
    reader = RunReader(tmp_path / "run")
    assert reader.status == "finished"
    assert len(likelihoods) == 3
    assert policy_run_config(tmp_path / "run") == config
    kept = reader.config()
    assert (kept["task"], kept["random_seed"], kept["policy"]) == ("digits", 3, "being learned")
    assert reader.environment()["random_seed"] == 3
    rows = [(row.epoch, row.step) for row in reader.metrics(name="mean_return")]
    assert rows == [(1, ROLLOUT), (2, 2 * ROLLOUT)]
    returns = [row.value for row in reader.metrics(name="mean_return")]
    assert returns == [report.mean_return for report in reports]
    names = {row.name for row in reader.metrics()}
    assert {"return/terminal", "return/progress", "final/loss", "entropy", "restarts"} <= names
    assert run.policy_file == tmp_path / "run" / POLICY_FILE
    saved = load_policy(run.policy_file).trained_on
    assert (saved["task"], saved["epochs"], saved["timesteps"]) == ("digits", 2, 2 * ROLLOUT)
    assert saved["mean_return"] == returns[-1]
    LearnedPolicy.load(run.policy_file)


def test_other_runs_are_demonstrated_than_learned_from_and_each_once() -> None:
    config = tiny("demonstrations.num_episodes=3", "episodes.first_random_seed=70")
    shown = MakeGrowthEnv(config.demonstrated)().make_run
    learned = MakeGrowthEnv(config)().make_run
    assert isinstance(shown, TaskRuns)
    assert isinstance(learned, TaskRuns)
    assert (learned.first_random_seed, learned.num_runs) == (70, 2)
    assert (shown.first_random_seed, shown.num_runs) == (72, 3)
    spaces_only = MakeGrowthEnv(config.unreferenced)().make_run
    assert isinstance(spaces_only, TaskRuns)
    assert not spaces_only.referenced
    assert shown.referenced


@pytest.mark.usefixtures("in_process")
def test_how_a_training_ended_is_told_in_its_folder(tmp_path: Path) -> None:
    for name, error, status in (
        ("interrupted", KeyboardInterrupt(), "interrupted"),
        ("failed", ValueError("spoilt"), "failed"),
    ):
        with (
            pytest.raises(type(error)),
            new_policy_run(tiny(rollouts=1), tmp_path / name),
        ):
            raise error
        assert RunReader(tmp_path / name).status == status
    with new_policy_run(tiny(), tmp_path / "left") as run:
        next(run.reports())
    assert RunReader(tmp_path / "left").status == "interrupted"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("demonstrations.policy=nonesuch", "no policy 'nonesuch'"),
        ("demonstrations.policy=missing.safetensors", "there is no policy file"),
        (
            'demonstrations.num_episodes=1 heuristic.blueprints=["typo"]',
            "blueprint 'typo' of the heuristic fits no slot",
        ),
        ("trainer.decision_interval_steps=999", "nothing would ever be decided"),
        ("training.device=cuda:99", "device 'cuda:99' cannot be used here"),
        ("ray=local", "no Ray here"),
    ],
)
def test_what_could_not_begin_leaves_no_folder(
    setting: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ray(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("no Ray here")

    monkeypatch.setattr(stored_policy_run, "RayWorkers", without_ray)
    with (
        pytest.raises((SettingsError, ModuleNotFoundError), match=told),
        new_policy_run(tiny(*setting.split()), tmp_path / "run"),
    ):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("in_process")
def test_a_training_leaves_the_process_as_many_threads_as_it_had(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with new_policy_run(tiny(), tmp_path / "run"):
            pass
        with resumed_policy_run(tmp_path / "run"):
            pass
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("in_process")
def test_a_policy_that_could_not_be_written_is_told_and_the_last_one_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_room(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with new_policy_run(tiny(), tmp_path / "run") as run:
        reports = run.reports()
        with monkeypatch.context() as full:
            full.setattr(policy_run, "save_policy", without_room)
            assert next(reports).problems == ("the policy was not written: no space left",)
            with pytest.raises(OSError, match="no space left"):
                next(reports)
    assert RunReader(tmp_path / "run").status == "interrupted"
    with resumed_policy_run(tmp_path / "run") as run:
        assert trained(run) == []
    assert load_policy(run.policy_file).trained_on["timesteps"] == 2 * ROLLOUT


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("before", [(), ("notes.txt",)])
def test_a_policy_that_cannot_be_imitated_leaves_no_folder(
    before: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for name in before:
        folder.mkdir()
        (folder / name).touch()
    config = tiny("demonstrations.policy=random", "actions.ramp_steps=[7]", "trainer.epochs=12")
    with (
        pytest.raises(NotImitableError, match="random cannot be imitated, it asks for"),
        new_policy_run(config, folder) as run,
    ):
        trained(run)
    assert tuple(path.name for path in tmp_path.rglob("*") if path.is_file()) == before
    assert folder.exists() == bool(before)


@pytest.mark.usefixtures("in_process")
def test_the_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    run = load_run_config("digits", None, [], {})
    RunStore(tmp_path, config=run.model_dump(mode="json"), environment={}).close()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with (
        pytest.raises(SettingsError, match=r"a run of digits, and no training .* by esper resume"),
        resumed_policy_run(tmp_path),
    ):
        pass
    with (
        pytest.raises(RunFolderError, match="holds a run already"),
        new_policy_run(tiny(), tmp_path),
    ):
        pass
    with (
        pytest.raises(RunFolderError, match="is no run folder"),
        resumed_policy_run(tmp_path / "nowhere"),
    ):
        pass
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


# What it goes on from


@pytest.mark.usefixtures("in_process")
def test_a_training_that_goes_on_comes_to_the_same_policy_to_the_bit(tmp_path: Path) -> None:
    with new_policy_run(tiny(), tmp_path / "whole") as run:
        whole = trained(run)
    with new_policy_run(tiny(rollouts=1), tmp_path / "parts") as run:
        first = trained(run)
    assert (tmp_path / "parts" / POLICY_FILE).read_bytes() != run_file(tmp_path / "whole")
    with resumed_policy_run(tmp_path / "parts", total_steps=2 * ROLLOUT) as run:
        assert run.resumed_at == ROLLOUT
        assert list(run.imitate()) == []
        then = trained(run)
    assert run_file(tmp_path / "parts") == run_file(tmp_path / "whole")
    assert [told.mean_return for told in (*first, *then)] == [told.mean_return for told in whole]
    metrics = [(row.epoch, row.step) for row in RunReader(tmp_path / "parts").metrics()]
    assert metrics == [(row.epoch, row.step) for row in RunReader(tmp_path / "whole").metrics()]
    assert RunReader(tmp_path / "parts").status == "finished"


def run_file(folder: Path) -> bytes:
    return (folder / POLICY_FILE).read_bytes()


@pytest.mark.usefixtures("in_process")
def test_what_was_imitated_once_is_not_imitated_again_and_a_lost_policy_is_written(
    tmp_path: Path,
) -> None:
    """As after a kill between the learner's state and the policy that is made of it."""
    config = tiny("demonstrations.num_episodes=1", rollouts=1)
    with new_policy_run(config, tmp_path) as run:
        trained(run)
    before = load_policy(tmp_path / POLICY_FILE).network.state_dict()
    (tmp_path / POLICY_FILE).unlink()
    with resumed_policy_run(tmp_path) as run:
        assert list(run.imitate()) == []
        assert list(run.reports()) == []
    after = load_policy(tmp_path / POLICY_FILE)
    written = run_file(tmp_path)
    with resumed_policy_run(tmp_path) as run:
        assert list(run.reports()) == []
    assert run_file(tmp_path) == written, "what was made with it could not go on otherwise"
    assert all(before[name].equal(value) for name, value in after.network.state_dict().items())
    assert after.trained_on["timesteps"] == ROLLOUT
    assert RunReader(tmp_path).status == "finished"


@pytest.mark.usefixtures("in_process")
def test_demonstrations_that_are_not_imitated_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_shorter(*asked: Any, **how: Any) -> list[Demonstration]:
        first, second = demonstrations.demonstrations(*asked, **how)
        return [first, replace(second, actions=second.actions[:1])]

    monkeypatch.setattr(policy_run, "demonstrations", one_shorter)
    with new_policy_run(tiny("demonstrations.num_episodes=2", rollouts=1), tmp_path) as run:
        next(run.imitate())
        assert run.num_left_out == 1


@pytest.mark.usefixtures("in_process")
def test_a_training_that_was_stopped_before_it_learned_begins_anew_to_the_bit(
    tmp_path: Path,
) -> None:
    config = tiny("demonstrations.num_episodes=1", rollouts=1)
    with new_policy_run(config, tmp_path / "whole") as run:
        trained(run)
    with new_policy_run(config, tmp_path / "stopped") as run:
        next(run.imitate())
    reader = RunReader(tmp_path / "stopped")
    assert reader.status == "interrupted"
    with resumed_policy_run(tmp_path / "stopped") as run:
        assert run.resumed_at is None
        trained(run)
    assert run_file(tmp_path / "stopped") == run_file(tmp_path / "whole")
    assert reader.status == "finished"


@pytest.mark.usefixtures("in_process")
def test_a_training_whose_state_is_refused_stays_as_it_was(tmp_path: Path) -> None:
    with new_policy_run(tiny(rollouts=1), tmp_path) as run:
        trained(run)
    reader = RunReader(tmp_path)
    before = reader.status, list(reader.events()), reader.attempt
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["policy_training"]["training"]["learning_rate"] *= 2.0
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (
        pytest.raises(ValueError, match="go on with the same settings"),
        resumed_policy_run(tmp_path),
    ):
        pass
    assert (reader.status, list(reader.events()), reader.attempt) == before


@pytest.mark.usefixtures("in_process")
def test_a_training_without_a_whole_state_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with new_policy_run(tiny(rollouts=1), tmp_path) as run:
        trained(run)
    for info in (tmp_path / STATES_FOLDER).glob("*/learner.json"):
        info.write_text("{", encoding="utf-8")
    with (
        pytest.raises(LearnerStateError, match="no state of a learner to go on from"),
        resumed_policy_run(tmp_path),
    ):
        pass
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del config["policy_training"]["rewards"]["gamma"]
    config["policy_training"]["rewards"]["gama"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SettingsError, match="is of another version"):
        policy_run_config(tmp_path)


# What it survives


@pytest.mark.usefixtures("in_process")
def test_runs_that_diverge_at_once_are_left_out_of_a_training_and_told(tmp_path: Path) -> None:
    """One in four does; what is imitated are the runs 4, 5 and so on."""
    more = ("episodes.first_random_seed=0", "episodes.num_runs=4", "demonstrations.num_episodes=5")
    config = load_policy_run_config(ADDRESS, None, [*TINY, "training.total_steps=24", *more], {})
    with new_policy_run(config, tmp_path) as run:
        reports = trained(run)
        assert run.num_left_out == 2
    told = [problem for report in reports for problem in report.problems]
    assert told
    assert all(": a run was left out: the host's run diverged before" in one for one in told)
    assert reports[-1].restarts == 0
    assert sum(report.episodes for report in reports) == 12


def test_an_environment_that_is_killed_is_started_again_and_told(tmp_path: Path) -> None:
    with new_policy_run(tiny(rollouts=3), tmp_path) as run:
        reports = run.reports()
        next(reports)
        victims = [child for child in multiprocessing.active_children() if child.daemon]
        assert len(victims) == 2
        assert victims[0].pid is not None
        os.kill(victims[0].pid, signal.SIGKILL)
        second = next(reports)
        third = next(reports)
        assert list(reports) == []
    assert (second.restarts, third.restarts) == (1, 1)
    assert "killed by signal 9 (SIGKILL)" in second.problems[0]
    assert third.problems == ()
    (record,) = RunReader(tmp_path).events()
    event = record.event
    assert isinstance(event, EnvironmentRestarted)
    assert (record.epoch, record.step, event.num_restarts) == (2, 2 * ROLLOUT, 1)
    assert event.reason == second.problems[0]
    assert [row.value for row in RunReader(tmp_path).metrics(name="restarts")] == [0, 1, 1]
    assert RunReader(tmp_path).status == "finished"
    assert (tmp_path / STATES_FOLDER).is_dir()
    assert not [child for child in multiprocessing.active_children() if child.daemon]
