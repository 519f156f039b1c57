"""`esper policy`: a policy is learned, deployed anywhere, and compared with others."""

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console
from typer.testing import CliRunner

from eager_policy import write_eager_policy
from esper.cli.app import app
from esper.cli.policy_views import (
    TrainingView,
    evaluation_record,
    evaluation_rows,
    print_evaluation,
    print_training,
)
from esper.experiments.config import load_run_config
from esper.experiments.run import build_setup
from esper.experiments.stored_run import stored_run
from esper.lifecycle.events import SeedGerminated
from esper.report import tell_training
from esper.rl import demonstrations, policy_run_config, stored_policy_run
from esper.rl.evaluation import EvaluatedRun, Evaluation, EvaluationConfig, EvaluationFolder
from esper.rl.workers import InProcessWorkers
from esper.telemetry import GROWN_FOLDER, RunReader
from told_training import report, write_training

TINY = (
    *("--epochs", "2", "--workers", "1"),
    *("--set", "training.steps_per_fragment=4", "--set", "training.batch_size=4"),
    *("--set", "training.num_epochs=1", "--set", "episodes.num_runs=1"),
)
ROLLOUT = 4
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SUBPROCESS = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "300"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments play here, one after another, and so do those who are imitated."""
    monkeypatch.setattr(stored_policy_run, "ProcessWorkers", InProcessWorkers)
    monkeypatch.setattr(demonstrations, "worker_pool", lambda _: ThreadPoolExecutor(1))


def esper(*arguments: str | Path, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == (2 if fails else 0), result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    """What is said, as one line without the frame, where nothing may be made."""
    before = sorted(Path().rglob("*"))
    told = esper(*arguments, fails=True)
    assert sorted(Path().rglob("*")) == before
    assert "Invalid value: " in told
    assert "pydantic" not in told
    return " ".join(told.replace("│", " ").split())


# Learning one


def test_training_prints_lines_and_goes_on_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    told = esper("policy", "train", "digits", *TINY, "--steps", "8", "--out", "a folder")
    lines = told.splitlines()
    assert lines[0] == ("learning from runs of digits, 2 epochs each: 8 decisions; processes: 1")
    assert [line.split()[:2] for line in lines[1:3]] == [["4", "decisions"], ["8", "decisions"]]
    assert all("return " in line and "entropy " in line for line in lines[1:3])
    assert lines[3].split() == [
        "mean",
        "over",
        "episodes",
        "first",
        "1",
        "of",
        "2",
        "rollouts",
        *["last", "1"],
    ]
    assert [line.split()[0] for line in lines[4:7]] == ["return", "parameter", "intervention"]
    assert "policy      a folder/policy.safetensors" in lines
    assert lines[-2].endswith("grow digits --policy 'a folder/policy.safetensors'")
    assert lines[-1].endswith(
        "policy eval digits --policy 'a folder/policy.safetensors' --policy random"
    )
    assert "\x1b" not in told
    first = Path("a folder/policy.safetensors").read_bytes()

    monkeypatch.setattr(stored_policy_run, "ProcessWorkers", InProcessWorkers)
    more = esper("policy", "train", "--out", "a folder", "--steps", "12").splitlines()
    assert more[:2] == [
        "learning from runs of digits, 2 epochs each: 12 decisions; processes: 1",
        "goes on after 8 decisions",
    ]
    assert more[2].split()[:2] == ["12", "decisions"]
    assert "first 1 of 3 rollouts" in more[3], "of the whole training, as esper report has it"
    assert Path("a folder/policy.safetensors").read_bytes() != first
    nothing = esper("policy", "train", "--out", "a folder", "--steps", "12")
    assert "nothing was left to learn; for more decisions add --steps" in nothing
    assert RunReader(Path("a folder")).status == "finished"


@pytest.mark.usefixtures("in_process")
def test_decisions_that_are_no_whole_number_of_rollouts_are_told_to_be_more() -> None:
    told = esper("policy", "train", "digits", *TINY, "--steps", "6", "--out", "run").splitlines()
    assert told[0] == "learning from runs of digits, 2 epochs each: 8 decisions; processes: 1"
    assert told[1].startswith("6 were asked for; rollouts are whole, of 1 x 4 decisions each")
    assert told[1].endswith("--set training.steps_per_fragment=N")
    assert "8 of 8 decisions, 2 rollouts" in esper("inspect", "run")


def test_the_end_of_a_training_tells_the_means_that_its_report_tells() -> None:
    write_training(Path("run"), [report(number, episodes=1 + number % 3) for number in range(1, 9)])
    story, console = tell_training(RunReader(Path("run"))), Console(width=80)
    with console.capture() as captured:
        print_training(console, story)
    lines = captured.get().splitlines()
    assert lines[0].split("  ")[-2:] == ["first 4 of 8 rollouts", " last 4"]
    # (2 * 0.85 + 3 * 0.95 + 1.05 + 2 * 1.15) / 8, (3 * 1.25 + 1.35 + 2 * 1.45 + 3 * 1.55) / 9
    assert [line.split() for line in lines[1:4]] == [
        ["return", "+0.9875", "+1.4056"],
        ["terminal", "+1.2375", "+1.6556"],
        ["parameter", "rent", "-0.2500", "-0.2500"],
    ]


@pytest.mark.usefixtures("in_process")
def test_json_output_is_one_object_per_line() -> None:
    imitating = ("--imitate", "heuristic", "--set", "demonstrations.num_episodes=1")
    imitating += ("--set", "demonstrations.passes=2")
    told = esper(
        "policy", "train", "digits", *TINY, "--steps", "4", *imitating, "--json", "--out", "run"
    )
    documents = [json.loads(line) for line in told.splitlines()]
    kinds = [document["kind"] for document in documents]
    assert kinds == ["imitation", "imitation", "rollout", "summary"]
    assert documents[0]["pass"] == 1
    assert documents[2]["timesteps"] == ROLLOUT
    assert documents[2]["return_parts"].keys() >= {"terminal", "progress"}
    assert documents[3]["policy"] == "run/policy.safetensors"


def test_imitation_is_told_now_and_then() -> None:
    console = Console(width=80)
    view = TrainingView(console, quiet=False, as_json=False)
    with console.capture() as captured:
        for number in range(1, 21):
            view.imitation(number, -0.5, num_left_out=2)
    assert captured.get().splitlines() == [
        "2 demonstrated episodes left out: diverged, or went back",
        *(f"imitating, pass {number}: log-likelihood -0.500" for number in (1, 10, 20)),
    ]


def test_a_dry_run_prints_settings_and_leaves_nothing() -> None:
    told = json.loads(esper("policy", "train", "text", "--imitate", "ucb1", "--dry-run"))
    assert told["run"]["task"] == "text"
    assert told["demonstrations"]["policy"] == "ucb1"
    assert told["training"]["num_workers"] == os.cpu_count()
    assert not any(Path().iterdir())


@pytest.mark.usefixtures("in_process")
def test_help_names_every_section_of_settings() -> None:
    told = esper("policy", "train", "--help")
    for name in policy_run_config.SECTIONS:
        assert f" {name}.KEY" in told or f"--{name} " in told, name


@pytest.mark.usefixtures("in_process")
def test_a_dry_run_of_a_training_that_goes_on_learns_nothing() -> None:
    esper("policy", "train", "digits", *TINY, "--steps", "8", "--out", "run")
    before = {file: file.read_bytes() for file in sorted(Path().rglob("*")) if file.is_file()}
    told = json.loads(esper("policy", "train", "--out", "run", "--steps", "999", "--dry-run"))
    assert told["training"]["total_steps"] == 999
    after = {file: file.read_bytes() for file in sorted(Path().rglob("*")) if file.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a task, or a folder to go on in: --out FOLDER"),
        (("--out", "nowhere"), "nowhere is no run folder"),
        (("--out", "nowhere", "--seed", "3"), "with its own settings, and --seed would change"),
        (("--out", "nowhere", "--set", "threads=3"), "and --set would change them"),
        (("digit",), "did you mean 'digits'"),
        (("digits", "--set", "training.batchsize=3"), "did you mean 'training.batch_size'"),
        (("digits", "--set", "demonstrations.pases=3"), "did you mean 'demonstrations.passes'"),
        (("digits", "--imitate", "nonesuch"), "no policy 'nonesuch'"),
        (("digits", "--imitate", "no.safetensors"), "there is no policy file "),
        (("digits", "--quiet", "--json"), "exclude each other"),
        (("digits", "--config", "missing.toml"), "cannot be read"),
        (("digits", "--set", "training.gamma=0.5"), "set both alike"),
        (("digits", "--set", "bus.commands=redis://127.0.0.1"), "run: bus connects one run"),
    ],
)
def test_what_cannot_be_learned_is_refused(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("policy", "train", *arguments)


class _Failing(InProcessWorkers):
    """Workers whose environment raises."""

    def __init__(self, make_env: Any, settings: Any, *, num_workers: int) -> None:
        super().__init__(_raise, settings, num_workers=num_workers)


def _raise() -> Any:
    raise OSError("the simulator is gone")


def test_a_training_whose_environments_fail_ends_with_why_until_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_policy_run, "ProcessWorkers", _Failing)
    result = CliRunner().invoke(app, ["policy", "train", "digits", *TINY, "--out", "run"])
    assert result.exit_code == 1
    assert "worker 0 failed 4 times in a row" in result.output
    assert "OSError: the simulator is gone" in result.output
    assert result.output.endswith(" policy train --out run\n")
    assert RunReader(Path("run")).status == "failed"
    why = "WorkersFailedError: worker 0 failed 4 times in a row"
    seen = [CliRunner().invoke(app, [command, "run"]).output for command in ("inspect", "report")]
    assert f"the training ended: {why}" in seen[0]
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert f"<p>{why}" in page[page.index("Why it ended") :]
    monkeypatch.setattr(stored_policy_run, "ProcessWorkers", InProcessWorkers)
    result = CliRunner().invoke(app, ["policy", "train", "--out", "run", "--steps", "4"])
    assert result.exit_code == 0, result.output
    assert why not in CliRunner().invoke(app, ["inspect", "run"]).output
    CliRunner().invoke(app, ["report", "run"])
    assert "Why it ended" not in Path("run/report.html").read_text(encoding="utf-8")


def test_a_training_that_is_interrupted_before_it_has_a_folder_had_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stored_policy_run.MakeGrowthEnv, "__call__", interrupted)
    result = CliRunner().invoke(app, ["policy", "train", "digits", *TINY, "--out", "run"])
    assert (result.exit_code, result.output) == (130, "stopped; the training had not begun\n")
    assert not Path("run").exists()


def test_an_interrupted_training_says_how_to_go_on() -> None:
    arguments = ["policy", "train", "digits", *TINY, "--steps", "100000", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "esper", *arguments],
        env=SUBPROCESS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "decisions  " in line:
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.startswith("stopped; go on with: ")
    assert told.endswith(" policy train --out run\n")
    assert RunReader(Path("run")).status == "interrupted"
    assert Path("run/policy.safetensors").exists()


@pytest.mark.parametrize(
    "arguments", [("policy", "train", "digits"), ("inspect", str(RESULTS / "policy-eval-digits"))]
)
def test_without_the_extra_its_name_is_told(arguments: tuple[str, ...]) -> None:
    script = "import sys; sys.modules['gymnasium'] = None; from esper.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=SUBPROCESS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs gymnasium and sb3-contrib: pip install 'esper-lite[rl]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(Path().iterdir())


# Deploying it


@pytest.mark.usefixtures("in_process")
def test_quiet_output_is_the_policy_which_is_deployed() -> None:
    told = esper("policy", "train", "digits", *TINY, "--steps", "4", "--seed", "7", "--quiet")
    (line,) = told.splitlines()
    folder = Path(line).parent
    assert line == str(folder / "policy.safetensors")
    assert folder.name.startswith("policy-digits-")
    assert RunReader(folder).config()["random_seed"] == 7
    told = esper("grow", "digits", "--policy", line, "--epochs", "2", "--no-report")
    assert "epoch 2/2" in told


def test_a_policy_grows_another_task_with_other_slots_and_blueprints() -> None:
    """Digits has two slots and eight blueprints, the other task four and five, of other names."""
    write_eager_policy(Path("eager.safetensors"))
    deploy = ("--policy", "eager.safetensors", "--epochs", "3", "--no-report")
    assert "germinated in stage1" in esper("grow", "digits", *deploy)
    assert "germinated in stages.0" in esper("grow", "teacher", *deploy, "--out", "other")
    assert RunReader(Path("other")).config()["policy"] == str(Path("eager.safetensors").absolute())


def _begin(folder: Path, *, stop_after: int) -> None:
    """Make a run of the policy in eager.safetensors that is stopped, with a checkpoint."""
    options = {"policy": "eager.safetensors", "trainer": {"epochs": 6}}
    config = load_run_config("digits", None, ["checkpoint.min_seconds=0"], options)
    with stored_run(config, folder, build_setup(config)) as run:
        for report in run.reports:
            if report.epoch == stop_after:
                raise KeyboardInterrupt


def test_a_run_of_a_learned_policy_resumes_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_eager_policy(Path("eager.safetensors"))
    esper(
        *("grow", "digits", "--policy", "eager.safetensors", "--epochs", "6"),
        *("--set", "checkpoint.min_seconds=0", "--out", "whole", "--no-report", "--quiet"),
    )
    with pytest.raises(KeyboardInterrupt):
        _begin(Path("parts"), stop_after=3)
    monkeypatch.chdir("parts")  # the policy's file is found from wherever
    assert "goes on from checkpoint" in esper("resume", ".", "--no-report")
    monkeypatch.chdir("..")
    whole, parts = (
        safetensors.torch.load_file(f"{run}/{GROWN_FOLDER}/model.safetensors")
        for run in ("whole", "parts")
    )
    assert any(isinstance(e.event, SeedGerminated) for e in RunReader(Path("whole")).events())
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_does_not_resume_with_a_policy_that_has_changed() -> None:
    write_eager_policy(Path("eager.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        _begin(Path("run"), stop_after=2)
    write_eager_policy(Path("eager.safetensors"), random_seed=1)
    told = esper("resume", "run", fails=True).replace("│", " ")
    told = " ".join(told.split())
    assert "go on with the file that the run began with" in told


def test_a_run_does_not_resume_without_its_policy() -> None:
    write_eager_policy(Path("eager.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        _begin(Path("run"), stop_after=1)
    Path("eager.safetensors").unlink()
    assert "there is no policy file" in " ".join(esper("resume", "run", fails=True).split())
    assert RunReader(Path("run")).status == "interrupted"


def _of_other_actions(file: Path) -> None:
    """Write a policy whose operations are others than this version's."""
    write_eager_policy(file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["esper_policy"])
    document["operations"] = [*document["operations"][:-1], "duplicate"]
    header["__metadata__"]["esper_policy"] = json.dumps(document)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("command", [("grow",), ("policy", "eval"), ("policy", "train")])
def test_a_bad_file_is_refused_and_nothing_is_made(command: tuple[str, ...]) -> None:
    Path("text.safetensors").write_text("a policy", encoding="utf-8")
    safetensors.torch.save_file({"weight": torch.ones(2)}, "tensors.safetensors")
    _of_other_actions(Path("other.safetensors"))
    option = "--imitate" if command == ("policy", "train") else "--policy"
    for file, words in (
        ("missing.safetensors", "there is no policy file"),
        ("text.safetensors", "is no safetensors file, or damaged"),
        ("tensors.safetensors", "holds tensors, and no Esper policy"),
        ("other.safetensors", "was made with other operations than this esper's: it has duplicate"),
    ):
        assert words in refused(*command, "digits", option, file, "--out", "run"), file


# Comparing policies


def test_policies_are_compared_in_a_table_and_the_folder_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("policy", "eval", "digits", "--policy", "none", "--policy", "heuristic")
    arguments += ("--seeds", "2", "--epochs", "2", "--processes", "2", "--out", "kept")
    arguments += ("--set", "rewards.gamma=0.5")
    monkeypatch.setenv("COLUMNS", "80")
    told = esper(*arguments)
    lines = told.splitlines()
    runs = [line for line in lines if " seed " in line]
    assert sorted(line.split()[0] for line in runs) == ["heuristic"] * 2 + ["none"] * 2
    assert all("FLOPs  return +" in line and "accuracy 0." in line for line in runs)
    table = lines[len(runs) : len(runs) + 3]
    assert table[0].split() == ["policy", "return", "test", "loss", "difference", "FLOPs"]
    assert [row.split()[0] for row in table[1:]] == ["none", "heuristic"]
    assert table[1].split()[-1][:2] == "0."
    assert table[2].split()[-1] == "1.00–1.00"
    assert max(len(line) for line in lines if line not in runs) <= 80
    assert "…" not in told
    assert lines[-1] == "folder  kept"
    kept = json.loads(Path("kept/evaluation.json").read_text("utf-8"))
    assert (kept["policies"], kept["random_seeds"]) == (["none", "heuristic"], [0, 1])
    assert (kept["run"]["count_flops"], kept["run"]["trainer"]["epochs"]) == (True, 2)
    assert kept["rewards"]["gamma"] == 0.5

    monkeypatch.setenv("COLUMNS", "120")
    again = esper(*arguments).splitlines()
    assert not any(" seed " in line for line in again), "nothing is left to be run"
    assert again[0].split() == [
        *("policy", "return", "test", "loss", "accuracy", "difference", "params", "committed"),
        *("epochs", "FLOPs"),
    ]
    assert esper(*arguments, "--quiet") == "kept\n"
    (summary,) = esper(*arguments, "--json").splitlines()
    record = json.loads(summary)
    assert (record.pop("kind"), record.pop("folder")) == ("summary", "kept")
    assert json.loads(esper("inspect", "kept", "--json")) == record
    shown = esper("inspect", "kept").splitlines()
    assert shown == again[: len(shown)]
    never, budget = record["policies"]
    assert (never["policy"], budget["policy"]) == ("none", "heuristic")
    assert f"{never['difference']['mean']:+.4f} ± " in again[1]
    assert f"{never['accuracy']['mean']:.4f} ± " in again[1]
    assert budget["difference"] is None
    assert budget["flops"] == {"least": 1.0, "most": 1.0}
    assert (budget["epochs"], never["committed"], record["finished"]) == (2.0, 0.0, True)
    words = refused(*arguments, "--first-seed", "1")
    assert "kept holds another evaluation, with other settings: random_seeds" in words


def test_an_evaluation_under_way_is_shown_as_far_as_it_is() -> None:
    whole = _evaluation("text", ())
    folder = EvaluationFolder(Path("kept"), whole.config)
    assert esper("inspect", "kept").splitlines() == [
        "no policy's runs can be compared yet",
        "not finished: the same command with --out kept goes on",
    ]
    diverged = {"test": {"loss": math.nan, "bits_per_byte": math.nan}}
    for run in whole.runs.values():
        if run.policy == "heuristic":
            folder.add(run)
        elif run.random_seed == 0:
            folder.add(run.model_copy(update=diverged))
    shown = esper("inspect", "kept")
    assert "schedule (1 of 2 seeds) " in shown
    assert "not finished: the same command with --out kept goes on" in shown
    record = json.loads(esper("inspect", "kept", "--json"))
    _, schedule = record["policies"]
    assert (schedule["seeds"], schedule["test_loss"]["mean"]) == (1, None)
    assert record["finished"] is False


def test_a_dry_run_of_an_evaluation_prints_settings_and_leaves_nothing() -> None:
    arguments = ("--policy", "random", "--seeds", "2", "--first-seed", "7", "--epochs", "3")
    told = json.loads(esper("policy", "eval", "digits", *arguments, "--dry-run"))
    assert (told["policies"], told["random_seeds"]) == (["random"], [7, 8])
    assert told["run"]["trainer"]["epochs"] == 3
    assert not any(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits", "--policy", "nonesuch"), "no policy 'nonesuch'; did you mean 'none'"),
        (("digits", "--policy", "nonesuch", "--dry-run"), "no policy 'nonesuch'"),
        (("digits", "--budget-of", "nonesuch"), "no policy 'nonesuch'"),
        (("digits", "--policy", "none", "--policy", "none"), "policies must differ"),
        (("digits", "--set", "growth_schedule.min_layers=9"), "from at least 9 layers"),
        (("digits", "--set", "trainer.epoch=3"), "did you mean 'trainer.epochs'"),
        (("digits", "--set", "training.gamma=1.0"), "an evaluation trains no policy"),
        (("digits", "--set", "tracking.wandb=true"), "run: tracking follows one run"),
        (("digits", "--quiet", "--json"), "exclude each other"),
        (("nonesuch",), "nonesuch"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("policy", "eval", *arguments)


def _evaluation(task: str, files: tuple[str, ...]) -> Evaluation:
    """An evaluation with labels as long as they may be expected."""
    run = load_run_config(task, None, [], {})
    policies = ("heuristic", "schedule", *files)
    config = EvaluationConfig(run=run, policies=policies, random_seeds=(0, 1))
    evaluation = Evaluation(config)
    for place, policy in enumerate(policies):
        for seed in config.random_seeds:
            evaluation.add(
                EvaluatedRun(
                    policy=policy,
                    policy_sha256="f" * 64 if policy in files else None,
                    random_seed=seed,
                    epochs=run.trainer.epochs,
                    steps=100,
                    flops=1e12 * (1.0 + place * (1 - seed)),
                    episode_return=-0.87654 * (1 + place * seed),
                    rewards={},
                    diverged=False,
                    test={"loss": 1.234567 * (1 + seed), "bits_per_byte": 1.3456 + seed},
                    param_count=123_456_789,
                    num_germinated=12,
                    num_committed=10,
                    num_pruned=2,
                )
            )
    return evaluation


@pytest.mark.parametrize("task", ["text", "teacher"])
@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_no_figure_of_the_table_is_cut_off(task: str, width: int) -> None:
    files = ("/runs/one/policy.safetensors", "/runs/other/policy.safetensors")
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        print_evaluation(console, _evaluation(task, files))
    table, _, notes = captured.get().partition("\n\n")
    rows = table.splitlines()
    assert "…" not in table
    assert max(map(len, rows)) <= width
    assert [row.split()[0] for row in rows] == [
        *("policy", "heuristic", "schedule", "one/policy", "other/policy"),
    ]
    wide = width >= 140
    assert ("123,456,789" in rows[1]) == ("10.0 of 12.0" in rows[1]) == wide
    assert rows[0].count("loss") == 1
    assert ("bits_per_byte" in rows[0]) == (wide and task == "text")
    assert rows[2].split()[-1] == "1.00–2.00"
    assert "difference: of the test loss to heuristic's" in " ".join(notes.split())


def test_an_evaluation_can_be_looked_at_where_its_task_is_not() -> None:
    evaluation = _evaluation("text", ())
    rows = evaluation_rows(evaluation)
    gone = evaluation.config.run.model_copy(update={"task": "python:gone:TASK"})
    config = evaluation.config.model_copy(update={"run": gone})
    elsewhere = Evaluation(config, list(evaluation.runs.values()))
    assert evaluation_rows(elsewhere) == rows
    assert "bits_per_byte" in evaluation_record(elsewhere)["policies"][0]
