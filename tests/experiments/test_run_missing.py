"""Comparisons that really run: processes, a folder, a kill in the middle."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from drawing_task import ADDRESS
from eager_policy import write_eager_policy
from esper.experiments import load_run_config, prepare
from esper.experiments.comparison import (
    CompareConfig,
    Comparison,
    ComparisonFolder,
    Outlook,
    RunRequest,
    RunResult,
    run_missing,
)
from esper.experiments.comparison.runs import GrowthRecord, execute, random_times_policy, result_of
from esper.experiments.series_folder import SeriesFolderError
from esper.policies import FractionTiming, GrowthSchedulePolicy, ReplayPolicy
from esper.tasks.digits import DIGITS
from esper.training.run_cost import Cost, RunCost

QUICK = (
    *("slot.ramp_steps=5", "slot.thresholds.min_steps_at_target=1"),
    *("slot.thresholds.min_line_search_gain_fraction=-1e9", "slot.thresholds.trial_epochs=1"),
    *("slot.thresholds.min_over_linear_fraction=-1e9", "slot.thresholds.min_training_steps=1"),
    *("slot.thresholds.min_contribution_fraction=-1e9", "heuristic.plateau_epochs=1"),
    *("slot.thresholds.max_loss_increase_fraction=1e9", "heuristic.warmup_epochs=1"),
)
"""Gates that let everything through, so that seeds are committed within a few epochs."""


def config(epochs: int, **settings: object) -> CompareConfig:
    run = load_run_config("digits", None, QUICK, {"trainer": {"epochs": epochs}})
    return CompareConfig(run=run, random_seeds=(0, 1), search_rates=1, **settings)


def test_a_network_of_the_grown_size_is_the_host_with_the_seeds_from_the_start() -> None:
    settings = config(epochs=9)
    request = RunRequest(
        arm="grown", random_seed=0, learning_rate=0.01, epochs=9, policy="heuristic"
    )
    grown = execute(request, settings.run)
    assert grown.committed, "nothing is refused"
    static = execute(
        request.model_copy(update={"arm": "static", "policy": "none", "topology": grown.committed}),
        settings.run,
    )
    assert static.param_count == grown.param_count
    assert static.steps == grown.steps
    assert static.flops == static.training_flops < grown.flops
    assert grown.training_flops < static.training_flops, "the grown one was small at first"
    again = execute(request, settings.run)
    assert again.model_dump(exclude={"seconds"}) == grown.model_dump(exclude={"seconds"})


def test_a_seed_that_still_lives_at_the_end_is_no_part_of_what_came_out() -> None:
    request = RunRequest(
        arm="grown", random_seed=0, learning_rate=0.01, epochs=3, policy="heuristic"
    )
    run = prepare(config(epochs=3).run, sinks=[record := GrowthRecord()])
    host = run.param_count()
    *_, last = run.reports
    (slot,) = run.growth.slots.living_slots
    assert slot.in_forward_path
    result = result_of(request, run, record, last.cost, diverged=False)
    finished = run.finish()
    slot.prune(reason="asked")
    assert not result.committed
    assert result.param_count == host == run.param_count()
    assert result.test == finished == run.setup.test()
    assert result.validation == (run.setup.selection or run.setup.validation)()


def test_a_run_that_diverges_is_a_result_which_loses_any_search() -> None:
    settings = config(epochs=2)
    request = RunRequest(
        arm="grown", random_seed=0, learning_rate=1e30, epochs=2, policy="heuristic"
    )
    result = execute(request, settings.run)
    assert result.diverged
    assert result.validation["loss"] == result.test["loss"] == math.inf
    assert (
        0
        < result.flops
        < execute(
            request.model_copy(update={"arm": "host", "policy": "none", "learning_rate": 0.01}),
            settings.run,
        ).flops
    )
    assert RunResult.model_validate_json(result.model_dump_json()).diverged
    assert Comparison(settings, [result]).rates("grown") == {1e30: math.inf}


def test_seeds_grown_at_random_times_are_those_that_the_default_grew() -> None:
    settings = config(epochs=9)
    grown = execute(
        RunRequest(arm="grown", random_seed=0, learning_rate=0.01, epochs=9, policy="heuristic"),
        settings.run,
    )
    randomly = execute(
        RunRequest(
            arm="random times",
            random_seed=0,
            learning_rate=0.01,
            epochs=9,
            topology=grown.committed,
            at_random_times=True,
        ),
        settings.run,
    )
    assert 0 < randomly.num_germinated <= len(grown.committed)
    assert randomly.flops > randomly.training_flops, "probes cost"


@pytest.mark.parametrize(("policy", "num_events"), [("schedule", 2), ("slope", 1)])
def test_depth_grows_at_as_many_random_times_while_the_learning_rate_is_stable(
    policy: str, num_events: int
) -> None:
    settings = {"fractions": (0.2, 0.4), "verdict_fraction": 0.6}
    run = load_run_config("text", None, (), {"policy": policy, "growth_schedule": settings})
    times = set()
    for seed in range(20):
        request = RunRequest(arm="random times", random_seed=seed, learning_rate=1.0, epochs=9)
        policy_then = random_times_policy(request, run, decisions=9)
        assert isinstance(policy_then, GrowthSchedulePolicy)
        assert isinstance(policy_then.timing, FractionTiming)
        due = policy_then.timing.fractions
        assert len(due) == num_events
        assert list(due) == sorted(due)
        assert run.warmup_fraction <= due[0]
        assert due[-1] <= 0.6, "before the verdict, which comes before the learning rate falls"
        times |= set(due)
    assert len(times) == 20 * num_events


def test_random_times_are_drawn_among_the_decisions_of_the_run() -> None:
    run = config(epochs=9).run
    grown = execute(
        RunRequest(arm="grown", random_seed=0, learning_rate=0.01, epochs=9, policy="heuristic"),
        run,
    )
    request = RunRequest(
        arm="random times", random_seed=0, learning_rate=0.01, epochs=9, topology=grown.committed
    )
    few, many = (random_times_policy(request, run, decisions=decisions) for decisions in (1, 1000))
    assert isinstance(few, ReplayPolicy)
    assert isinstance(many, ReplayPolicy)
    assert {epoch for epoch, _ in few.waiting} == {1}
    assert max(epoch for epoch, _ in many.waiting) > 9


def test_what_a_request_asks_for_is_what_is_run() -> None:
    settings = config(epochs=1)
    first = RunRequest(arm="host", random_seed=0, learning_rate=0.01, epochs=1)
    requests = [
        first,
        first.model_copy(update={"random_seed": 1}),
        first.model_copy(update={"learning_rate": 0.02}),
        first.model_copy(update={"epochs": 2}),
    ]
    losses = {execute(request, settings.run).test["loss"] for request in requests}
    assert len(losses) == 4
    assert execute(first, settings.run).test["loss"] in losses


def test_what_a_host_and_its_batches_draw_follows_from_the_request_alone() -> None:
    run = load_run_config(ADDRESS, None, (), {"trainer": {"epochs": 1}})
    request = RunRequest(arm="host", random_seed=0, learning_rate=0.01, epochs=1)
    first, again = execute(request, run), execute(request, run)
    assert again.test == first.test
    assert execute(request.model_copy(update={"policy": "heuristic"}), run).test == first.test, (
        "of every arm, and nothing grows in one epoch"
    )
    other = request.model_copy(update={"random_seed": 1})
    assert execute(other, run).test != first.test


def test_an_arm_that_never_grows_runs_with_accumulated_gradients() -> None:
    settings = config(epochs=1)
    trainer = settings.run.trainer.model_copy(update={"accumulation_steps": 2})
    run = settings.run.model_copy(update={"trainer": trainer})
    request = RunRequest(arm="host", random_seed=0, learning_rate=0.01, epochs=1)
    assert execute(request, run).steps * 2 == execute(request, settings.run).steps


@pytest.mark.parametrize(
    ("policy", "flops"),
    [("none", 1), ("schedule", 1 + 100), ("heuristic", 1 + 100 + 10)],
)
def test_an_evaluation_is_a_cost_of_growing_where_the_policy_decides_by_it(
    policy: str, flops: int
) -> None:
    """The heuristic looks at the held-out loss, the schedule at the clock."""
    request = RunRequest(arm="arm", random_seed=0, learning_rate=0.1, epochs=9, policy=policy)
    run_config = config(epochs=9).run.model_copy(update={"policy": policy})
    run = prepare(run_config)
    run.setup = replace(run.setup, selection=lambda: {"loss": 7.0})
    cost = RunCost(
        training=Cost(flops=1, seconds=1.0),
        evaluation=Cost(flops=10, seconds=10.0),
        decision=Cost(flops=100, seconds=100.0),
    )
    result = result_of(request, run, GrowthRecord(), cost, diverged=False)
    assert (result.flops, result.seconds, result.training_flops) == (flops, flops, 1)
    assert result.validation["loss"] == 7.0, "rates are chosen by all there is"
    assert result.test["loss"] != 7.0


def test_every_run_is_kept_once_and_progress_is_told(tmp_path: Path) -> None:
    settings = config(epochs=2)
    folder = ComparisonFolder(tmp_path / "compare", settings)
    told: list[tuple[Outlook, RunResult | None]] = []
    comparison = run_missing(
        settings, folder, processes=2, on_change=lambda *change: told.append(change)
    )
    finished = [result for _, result in told if result is not None]
    assert len(finished) == len(comparison.results) == 4, "host and grown, two seeds each"
    assert not comparison.missing()
    last, _ = told[-1]
    assert (last.finished, last.expected, last.running, last.seconds_left) == (4, 4, (), 0.0)
    assert max(len(outlook.running) for outlook, _ in told) == 2
    (tmp_path / "compare" / "environment.json").unlink()
    kept = ComparisonFolder(tmp_path / "compare", settings).runs()  # of another machine, or lost
    assert {result.request.key for result in kept} == set(comparison.results)
    (tmp_path / "compare" / "runs" / f"{kept[0].request.key}.json").unlink()
    with pytest.raises(SeriesFolderError, match="does not tell which versions"):
        ComparisonFolder(tmp_path / "compare", settings)


def test_runs_are_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    settings = config(epochs=2)
    folder = ComparisonFolder(tmp_path, settings)
    with ComparisonFolder(tmp_path, settings).making_runs():  # flock knows files opened, not pids
        with pytest.raises(SeriesFolderError, match="another process makes the runs of"):
            run_missing(settings, folder, processes=1, on_change=lambda *_: None)
        assert folder.runs() == []
    comparison = run_missing(settings, folder, processes=2, on_change=lambda *_: None)
    with folder.making_runs() as one, folder.making_runs() as other:
        assert len(one) == len(other) == len(comparison.results), "none is missing"


def test_a_run_that_raises_names_itself_and_keeps_the_others(tmp_path: Path) -> None:
    settings = config(epochs=2)
    run = settings.run.model_copy(
        update={"heuristic": DIGITS.heuristic.model_copy(update={"blueprints": ("nonesuch",)})}
    )
    run = run.model_copy(update={"trainer": run.trainer.model_copy(update={"epochs": 8})})
    settings = settings.model_copy(update={"run": run})
    folder = ComparisonFolder(tmp_path / "compare", settings)
    with pytest.raises(ValueError, match="nonesuch") as caught:
        run_missing(settings, folder, processes=1, on_change=lambda *_: None)
    assert any("arm 'grown', random seed 0" in note for note in caught.value.__notes__)


def test_another_comparison_is_not_mixed_in(tmp_path: Path) -> None:
    ComparisonFolder(tmp_path / "compare", config(epochs=2))
    with pytest.raises(SeriesFolderError, match=r"run\.trainer\.epochs is 2 there, 3 here"):
        ComparisonFolder(tmp_path / "compare", config(epochs=3))
    environment = tmp_path / "compare" / "environment.json"
    kept = json.loads(environment.read_text())
    old_torch = {"packages": {**kept["packages"], "torch": "1.0"}}
    for old, words in ((old_torch, r"torch 1\.0"), ({"python": "3.1"}, r"Python 3\.1")):
        environment.write_text(json.dumps({**kept, **old}))
        with pytest.raises(SeriesFolderError, match=f"begun with {words}"):
            ComparisonFolder(tmp_path / "compare", config(epochs=2))
    environment.write_text("{}")
    with pytest.raises(SeriesFolderError, match="does not tell which versions"):
        ComparisonFolder(tmp_path / "compare", config(epochs=2))
    environment.write_text('{"packages": {"torch": 1')
    with pytest.raises(SeriesFolderError, match="does not tell which versions"):
        ComparisonFolder(tmp_path / "compare", config(epochs=2))
    environment.unlink()
    with pytest.raises(SeriesFolderError, match="does not tell which versions"):
        ComparisonFolder(tmp_path / "compare", config(epochs=2))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(SeriesFolderError, match="not empty"):
        ComparisonFolder(tmp_path / "else", config(epochs=2))
    with pytest.raises(SeriesFolderError, match="no comparison"):
        ComparisonFolder.config_of(tmp_path / "else")


def test_a_comparison_whose_start_was_killed_begins_anew(tmp_path: Path) -> None:
    ComparisonFolder(tmp_path, config(epochs=2))
    (tmp_path / "compare.json").rename(tmp_path / ".compare.json.4711")
    folder = ComparisonFolder(tmp_path, config(epochs=3))
    assert ComparisonFolder.config_of(tmp_path).run.trainer.epochs == 3
    assert folder.runs() == []
    for name in ("compare.json", ".compare.json.4711"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / ".kept").touch()
    with pytest.raises(SeriesFolderError, match="not empty and holds no comparison"):
        ComparisonFolder(tmp_path, config(epochs=3))


def test_a_policy_file_that_has_changed_is_not_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "learned.safetensors"
    write_eager_policy(file, random_seed=0)
    settings = config(epochs=1)
    run = settings.run.model_copy(update={"policy": str(file)})
    settings = settings.model_copy(update={"run": run})
    folder = ComparisonFolder(tmp_path / "compare", settings)
    request = RunRequest(arm="grown", random_seed=0, learning_rate=0.01, epochs=1, policy=str(file))
    result = execute(request, run)
    folder.add(result)
    assert ComparisonFolder(tmp_path / "compare", settings).runs() == [result]
    write_eager_policy(file, random_seed=1)
    with pytest.raises(SeriesFolderError, match="has changed since"):
        ComparisonFolder(tmp_path / "compare", settings)
    again = request.model_copy(update={"random_seed": 1})
    with pytest.raises(SeriesFolderError, match="has changed since"):
        folder.add(execute(again, run))
    assert folder.runs() == [result], "made with the other file"
    file.unlink()
    with pytest.raises(SeriesFolderError, match=r"learned\.safetensors cannot be read"):
        ComparisonFolder(tmp_path / "compare", settings)


def test_policy_files_as_further_arms_are_kept_and_found_from_wherever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = ("one/policy.safetensors", "other/policy.safetensors")
    for number, name in enumerate(relative):
        write_eager_policy(Path(name), random_seed=number)
    settings = config(epochs=1, policies=relative, random_times=False, equal_flops=False)
    folder = ComparisonFolder(tmp_path / "compare", settings)
    made: list[RunResult] = []
    while missing := Comparison(settings, made).missing():
        made.append(execute(missing[0], settings.run))
        folder.add(made[-1])
        assert len(made) <= 8, "host, grown and two policies, two seeds each"
    files = [file.parent for file in tmp_path.rglob("*-seed*.json")]
    assert files == [folder.path / "runs"] * 8
    monkeypatch.chdir("/")
    again = ComparisonFolder(folder.path, ComparisonFolder.config_of(folder.path))
    comparison = Comparison(again.config, again.runs())
    assert not comparison.missing()
    assert comparison.arms == ["host", "grown", *(f"policy {name}" for name in relative)]
    decided = {run.request.arm: run.request.policy for run in again.runs()}
    assert decided["policy one/policy.safetensors"] == str(tmp_path / relative[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_comparison_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    command = [
        *(sys.executable, "-m", "esper", "compare", "digits", "--epochs", "3", "--seeds", "2"),
        *("--rates", "1", "--processes", "1", "--out", str(folder), "--json"),
    ]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert json.loads(first.stdout.readline())["kind"] == "run"
    children = descendants(first.pid)
    assert children
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    kept = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").glob("*.json")}
    assert kept
    deadline = time.monotonic() + 60.0
    while any(map(alive, children)):  # they notice by themselves
        assert time.monotonic() < deadline, "an orphan is left"
        os.sched_yield()
    changed = subprocess.run(
        [sys.executable, "-m", "esper", "compare", "--out", str(folder), "--rates", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert changed.returncode == 2
    assert "--rates would change them" in " ".join(changed.stderr.replace("│", "").split())
    second = subprocess.run(
        [sys.executable, "-m", "esper", "compare", "--out", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in second.stdout.splitlines()]
    assert [line["kind"] for line in lines].count("run") == 4 - len(kept)
    assert lines[-1]["outcome"] == "growth does not pay here" or "too few" in str(lines[-1])
    assert (folder / "compare.png").exists()
    inspected = subprocess.run(
        [sys.executable, "-m", "esper", "inspect", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(inspected.stdout) == json.loads((folder / "summary.json").read_text())
    for name, written in kept.items():
        assert (folder / "runs" / name).stat().st_mtime_ns == written


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    found = [int(child) for child in children]
    return found + [pid for child in found for pid in descendants(child)]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
