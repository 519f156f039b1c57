"""Evaluating policies: with as many operations each, and kept run by run."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from itertools import count
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diverging_task import ADDRESS
from eager_policy import write_eager_policy
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import prepare
from esper.experiments.series_folder import SeriesFolderError
from esper.experiments.settings import SettingsError
from esper.experiments.worker_pool import WorkerDiedError
from esper.lifecycle.events import SeedCommitted, SeedGerminated, SeedPruned
from esper.rl.evaluation import (
    TOLERANCE,
    EvaluatedRun,
    Evaluation,
    EvaluationConfig,
    EvaluationFolder,
    check_policies,
    evaluate,
    play,
    read_evaluation,
)
from growth_problem import Recorder

MOST_TRIES = 5
EPOCHS = 100
NO_STEP = 2 * MOST_TRIES
"""More rounds than any evaluation of one policy may take."""


def run_config(**settings: Any) -> RunConfig:
    chosen = {"trainer": {"epochs": EPOCHS}, **settings}
    return load_run_config("digits", None, [], chosen)


RUN = run_config()


def evaluation_config(*policies: str, seeds: tuple[int, ...] = (0,), **settings: Any) -> Any:
    return EvaluationConfig(
        run=settings.pop("run", RUN), policies=policies, random_seeds=seeds, **settings
    )


def finished(policy: str, random_seed: int = 0, epochs: int = EPOCHS, **known: Any) -> EvaluatedRun:
    plain: dict[str, Any] = {
        "policy_sha256": None,
        "steps": 20 * epochs,
        "flops": 100.0,
        "episode_return": 0.5,
        "rewards": {"terminal": 0.5},
        "diverged": False,
        "test": {"loss": 0.1, "accuracy": 0.9},
        "param_count": 678,
        "num_germinated": 1,
        "num_committed": 0,
        "num_pruned": 1,
    }
    key = {"policy": policy, "random_seed": random_seed, "epochs": epochs}
    return EvaluatedRun(**{**plain, **key, **known})


def tries(
    flops_of: Callable[[int], float], *, run: RunConfig = RUN, budget: float = 100.0, **known: Any
) -> tuple[Evaluation, list[int]]:
    """Let a policy's runs cost what is told, until none is missing; return how long they were."""
    config = evaluation_config("random", run=run)
    evaluation = Evaluation(config, [finished("heuristic", flops=budget)])
    lengths = []
    for _ in range(NO_STEP):
        missing = evaluation.missing()
        if not missing:
            return evaluation, lengths
        ((policy, random_seed, epochs),) = missing
        lengths.append(epochs)
        made = finished(policy, random_seed, epochs, flops=flops_of(epochs), **known)
        evaluation.add(made)
    raise AssertionError(f"never done: {lengths}")


# What is to be run


def test_the_policy_that_sets_the_budget_goes_first_whether_it_is_among_them_or_not() -> None:
    for policies in (("random", "none"), ("random", "heuristic", "none")):
        evaluation = Evaluation(evaluation_config(*policies, seeds=(3, 4)))
        assert evaluation.missing() == [
            (policy, seed, EPOCHS) for seed in (3, 4) for policy in ("heuristic", "random", "none")
        ]
    other = Evaluation(evaluation_config("random", "none", budget_of="none"))
    assert [policy for policy, _, _ in other.missing()] == ["none", "random"]


def test_it_is_never_run_longer_than_it_is_and_others_as_long_as_costs_the_same() -> None:
    evaluation, lengths = tries(lambda epochs: 0.5 * epochs)
    assert lengths == [100, 200]
    assert evaluation.runs["heuristic", 0, EPOCHS].flops == 100.0
    assert evaluation.table() == {"random": [evaluation.runs["random", 0, 200]]}


@pytest.mark.parametrize(
    ("share", "lengths"),
    [
        (1.0 + 0.99 * TOLERANCE, [EPOCHS]),
        (1.0 - 0.99 * TOLERANCE, [EPOCHS]),
        (1.04, [EPOCHS, 96]),
        (0.96, [EPOCHS, 104]),
    ],
)
def test_a_run_within_tolerance_of_the_budget_is_close_enough(
    share: float, lengths: list[int]
) -> None:
    assert tries(lambda epochs: 100.0 * share * epochs / EPOCHS)[1] == lengths


def test_a_whole_epoch_is_the_least_that_a_run_has() -> None:
    evaluation, lengths = tries(lambda epochs: 1000.0 * epochs)
    assert lengths == [100, 1]
    assert evaluation.table()["random"][0].epochs == 1


@pytest.mark.parametrize(("interval", "least"), [(20, 1), (21, 2), (60, 3), (61, 4)])
def test_a_run_is_no_shorter_than_it_takes_to_decide_once(interval: int, least: int) -> None:
    """An epoch has 20 steps: a run of fewer than the interval would be refused."""
    run = run_config(trainer={"epochs": EPOCHS, "decision_interval_steps": interval})
    evaluation, lengths = tries(lambda epochs: 1000.0 * epochs, run=run)
    assert lengths == [100, least]
    assert evaluation.table()["random"][0].epochs == least


def test_a_run_that_diverged_tells_what_it_has_to_tell_and_is_not_repeated() -> None:
    evaluation, lengths = tries(lambda _: 30.0, diverged=True)
    assert lengths == [EPOCHS]
    assert evaluation.table()["random"][0].diverged


def test_the_closest_of_five_tries_is_kept_where_costs_jump() -> None:
    costs = iter([40.0, 180.0, 60.0, 140.0, 80.0])
    evaluation, lengths = tries(lambda _: next(costs))
    assert lengths == [100, 250, 139, 232, 166]
    assert evaluation.table()["random"][0].flops == 80.0


def test_half_and_twice_the_budget_are_equally_far() -> None:
    runs = [finished("heuristic")]
    runs += [finished("random", epochs=4, flops=50.0), finished("random", epochs=9, flops=190.0)]
    best = Evaluation(evaluation_config("random"), runs).best("random", 0)
    assert best is not None
    assert best.flops == 190.0


@given(st.lists(st.floats(0.2, 5.0), min_size=NO_STEP, max_size=NO_STEP))
def test_it_comes_to_an_end_whatever_runs_cost_and_keeps_the_closest(shares: list[float]) -> None:
    numbers = count()
    evaluation, lengths = tries(lambda epochs: epochs * shares[next(numbers)])
    assert len(lengths) == len(set(lengths)) <= MOST_TRIES
    kept = evaluation.table()["random"][0].flops / 100.0
    others = [run.flops / 100.0 for run in evaluation.runs.values() if run.policy == "random"]
    assert max(kept, 1 / kept) == pytest.approx(min(max(x, 1 / x) for x in others))


def test_every_seed_has_a_budget_of_its_own() -> None:
    runs = [
        finished("heuristic", 0, flops=100.0),
        finished("heuristic", 1, flops=200.0),
        finished("none", 0, flops=100.0),
        finished("none", 1, flops=100.0),
    ]
    evaluation = Evaluation(evaluation_config("none", seeds=(0, 1)), runs)
    assert (evaluation.budget(0), evaluation.budget(1)) == (100.0, 200.0)
    assert evaluation.missing() == [("none", 1, 200)]


def test_the_table_has_what_is_asked_for_in_that_order() -> None:
    config = evaluation_config("random", "heuristic", "none", seeds=(1, 0))
    runs = [finished(policy, seed) for policy in ("heuristic", "random") for seed in (0, 1)]
    table = Evaluation(config, runs).table()
    assert list(table) == ["random", "heuristic", "none"]
    assert [run.random_seed for run in table["random"]] == [1, 0]
    assert table["none"] == []
    without_budget = Evaluation(config, [finished("random")])
    assert without_budget.best("random", 0) is None
    assert without_budget.missing()[0] == ("heuristic", 1, EPOCHS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"policies": ("none", "none")}, "policies must differ from each other"),
        ({"policies": ()}, "at least 1 item"),
        ({"policies": ("none",), "random_seeds": (1, 1)}, "random_seeds must differ"),
    ],
)
def test_what_is_no_evaluation_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationConfig(run=RUN, **wrong)


def test_a_policy_that_could_not_decide_is_told_before_anything_is_run(tmp_path: Path) -> None:
    check_policies(evaluation_config("none", "schedule"))
    deep = run_config(growth_schedule={"min_layers": 9})
    with pytest.raises(SettingsError, match="grows from at least 9 layers"):
        check_policies(evaluation_config("none", "schedule", run=deep))
    falling = run_config(schedule="cosine")
    with pytest.raises(SettingsError, match="slope: schedule=cosine falls from the first step"):
        check_policies(evaluation_config("slope", run=falling))
    missing = str(tmp_path / "missing.safetensors")
    with pytest.raises(SettingsError, match="there is no policy file"):
        check_policies(evaluation_config(missing))


# The folder


def test_a_folder_goes_on_where_it_was(tmp_path: Path) -> None:
    config = evaluation_config("random", "none")
    kept = [finished("heuristic"), finished("random", epochs=107, flops=102.0)]
    kept += [finished("random", flops=94.0)]
    kept += [finished("none", diverged=True, flops=9.0, test={"loss": nan, "accuracy": 0.1})]
    for run in kept:
        EvaluationFolder(tmp_path / "new", config).add(run)
    again = EvaluationFolder(tmp_path / "new", config)
    assert sorted(map(repr, again.runs())) == sorted(map(repr, kept))
    assert Evaluation(config, again.runs()).missing() == []
    environment = json.loads((tmp_path / "new" / "environment.json").read_text("utf-8"))
    assert environment["packages"]["torch"] == torch.__version__


def test_runs_are_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    config = evaluation_config("random")
    folder = EvaluationFolder(tmp_path, config)
    with (
        EvaluationFolder(tmp_path, config).making_runs(),
        pytest.raises(SeriesFolderError, match="another process makes the runs of"),
    ):
        evaluate(config, folder, processes=1)
    assert folder.runs() == []


def test_another_evaluations_folder_is_refused(tmp_path: Path) -> None:
    EvaluationFolder(tmp_path / "kept", evaluation_config("random"))
    for other in (evaluation_config("none"), evaluation_config("random", seeds=(0, 1))):
        with pytest.raises(
            SeriesFolderError, match="holds another evaluation, with other settings: "
        ):
            EvaluationFolder(tmp_path / "kept", other)
    with pytest.raises(SeriesFolderError, match="is not empty and holds no evaluation"):
        EvaluationFolder(tmp_path, evaluation_config("random"))
    (tmp_path / "kept" / "evaluation.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SeriesFolderError, match=r"evaluation\.json is not of this version: "):
        EvaluationFolder(tmp_path / "kept", evaluation_config("random"))


def test_a_damaged_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path, evaluation_config("random"))
    folder.add(finished("random"))
    (file,) = tmp_path.glob("run-*")
    file.write_text(file.read_text("utf-8")[:-20], encoding="utf-8")
    with pytest.raises(SeriesFolderError, match=f"{file} is damaged; delete it"):
        folder.runs()
    file.unlink()
    assert folder.runs() == []


def test_a_run_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EvaluationFolder(tmp_path, evaluation_config("random"))

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            folder.add(finished("random"))
    assert folder.runs() == []
    folder.add(finished("random"))
    assert folder.runs() == [finished("random")]


def test_policies_in_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    files = [tmp_path / name / "policy.safetensors" for name in ("one", "other")]
    hashes = [write_eager_policy(file, seed) for seed, file in enumerate(files)]
    config = evaluation_config(*map(str, files))
    folder = EvaluationFolder(tmp_path / "kept", config)
    folder.add(finished("heuristic"))
    for file, sha256 in zip(files, hashes, strict=True):
        folder.add(finished(str(file), policy_sha256=sha256))
    assert {run.policy for run in folder.runs()} == {"heuristic", *map(str, files)}
    assert evaluate(config, folder, processes=1).missing() == []


def test_a_policy_that_was_trained_on_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    sha256 = write_eager_policy(file)
    config = evaluation_config(str(file))
    folder = EvaluationFolder(tmp_path / "kept", config)
    folder.add(finished("heuristic"))
    folder.add(finished(str(file), policy_sha256=sha256))
    write_eager_policy(file, random_seed=1)
    with pytest.raises(SeriesFolderError, match=r"has changed since .*run-1-policy-0-100.json was"):
        EvaluationFolder(tmp_path / "kept", config)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"packages": {"torch": "1.0", "esper-lite": "0.1"}}, r"torch 1\.0"),
        ({"device": "NVIDIA H100"}, "device NVIDIA H100, this is cpu"),
    ],
)
def test_runs_of_another_machine_are_shown_and_no_others_added(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = evaluation_config("random")
    kept = [finished("heuristic"), finished("random")]
    folder = EvaluationFolder(tmp_path, config)
    for run in kept:
        folder.add(run)
    environment = tmp_path / "environment.json"
    made_on = json.loads(environment.read_text("utf-8"))
    environment.write_text(json.dumps({**made_on, **other}), encoding="utf-8")
    shown = evaluate(config, EvaluationFolder(tmp_path, config), processes=1)
    assert list(shown.runs.values()) == kept
    folder.file_of(kept[1]).unlink()
    with pytest.raises(SeriesFolderError, match=f"was begun with {words}"):
        EvaluationFolder(tmp_path, config)


# The runs


@pytest.mark.parametrize("policy", ["random", "heuristic", "learned.safetensors"])
def test_a_run_is_an_ordinary_one_to_the_bit(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sha256 = write_eager_policy(tmp_path / "learned.safetensors")
    soon = {"warmup_epochs": 1, "plateau_epochs": 1}
    config = evaluation_config(policy, run=run_config(heuristic=soon))
    played = play(config, policy, 5, 6)
    recorder = Recorder()
    chosen = {"heuristic": soon, "trainer": {"epochs": 6}}
    ordinary = run_config(policy=policy, random_seed=5, **chosen)
    run = prepare(ordinary, sinks=[recorder])
    for _ in run.reports:
        pass
    assert run.param_count() == played.param_count
    assert run.judged(run.setup.test) == played.test
    assert run.spent(run.growth.meter.cost).flops == played.flops
    assert run.growth.step == played.steps == 120
    assert len(recorder.of(SeedGerminated)) == played.num_germinated > 0, "something has grown"
    assert len(recorder.of(SeedCommitted)) == played.num_committed
    assert len(recorder.of(SeedPruned)) == played.num_pruned
    assert played.policy_sha256 == (sha256 if policy == "learned.safetensors" else None)
    assert played.episode_return == pytest.approx(sum(played.rewards.values()))


def test_a_run_that_diverges_before_its_first_decision_ends_no_evaluation(tmp_path: Path) -> None:
    run = load_run_config(ADDRESS, None, [], {"trainer": {"epochs": 2}})
    config = evaluation_config("none", "random", seeds=(0, 1), run=run, budget_of="none")
    evaluation = evaluate(config, EvaluationFolder(tmp_path, config), processes=2)
    assert evaluation.missing() == []
    for bad, good in evaluation.table().values():
        assert (bad.diverged, bad.rewards, bad.episode_return) == (True, {"diverged": -10.0}, -10.0)
        assert not good.diverged
    assert read_evaluation(tmp_path).runs.keys() == evaluation.runs.keys()


def test_a_killed_process_loses_its_run_and_no_other(tmp_path: Path) -> None:
    run = run_config(trainer={"epochs": 1})
    config = evaluation_config("random", seeds=(0, 1), run=run, budget_of="none")
    folder = EvaluationFolder(tmp_path, config)
    told = []

    def kill(_: Evaluation, run: EvaluatedRun) -> None:
        told.append(run)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(
        WorkerDiedError, match=r"random seed \d, 1 epochs was under way. Start again"
    ):
        evaluate(config, folder, processes=2, on_run=kill)
    for child in multiprocessing.active_children():
        child.join()
    assert folder.runs() == sorted(told, key=folder.file_of)
    assert told
    before = {run.key for run in told}
    evaluation = evaluate(config, folder, processes=1, on_run=lambda _, run: told.append(run))
    assert evaluation.missing() == []
    assert len({run.key for run in told}) == len(told) == len(folder.runs()), "none twice"
    assert before < evaluation.runs.keys()
    again = play(config, "random", 1, 1)
    assert evaluation.runs["random", 1, 1] == again
