"""Growing on any data from the shell: which task, what it says of the data, where the run goes."""

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from esper.cli.app import app
from esper.cli.options import new_folder
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import GrowingRun
from esper.tasks.collection.source import open_source
from esper.tasks.digits.data import load_splits
from esper.telemetry import RunReader

LACKS_SOMETHING = """
from dataclasses import replace
from esper.tasks.digits import DIGITS


def build(random_seed):
    return replace(DIGITS.build(random_seed), {})


TASK = replace(DIGITS, build=build)
"""
ADVICE = ("slot.thresholds.max_linear_share=1", "slot.thresholds.min_over_linear_fraction=none")
SHORT = ("--epochs", "2", "--set", "threads=1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, with a library that writes nowhere else, and restore the threads."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "300")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def grow(*arguments: str, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, ["grow", *arguments])
    assert result.exit_code == (2 if fails else 0), result.output
    return result


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Dark and light squares in two class folders."""
    for level, name in ((20, "dark"), (200, "light")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            path = tmp_path / "pictures" / name / f"{number}.png"
            Image.new("L", (8, 8), level + number).save(path)
    return tmp_path / "pictures"


def only_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def test_folder_of_images_grows_end_to_end(pictures: Path) -> None:
    output = grow(
        "--task",
        f"folder:{pictures}",
        *("--epochs", "5", "--set", "heuristic.warmup_epochs=1", "--set", "threads=1"),
        *("--set", "heuristic.plateau_epochs=1", "--seed", "3", "--control"),
    ).output
    assert "data: validation: 4 of 40 rows taken from train, as it has no split" in output
    assert "germinated in stage1" in output
    assert "host alone" in output
    reader = RunReader(only_run())
    assert reader.status == "finished"
    assert reader.config()["task"] == f"folder:{pictures}"
    assert any("validation: 4 of 40" in note for note in reader.environment()["data_notes"])
    accuracy = [row.value for row in reader.metrics() if row.name == "accuracy"]
    assert accuracy[-1] == 1.0


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_text_grows_end_to_end(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    texts = [f"chapter {number}: " + "once upon a time, " * 30 for number in range(20)]
    if suffix == "txt":
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "data.parquet")
    output = grow(f"folder:{folder}", *SHORT, "--json").output
    documents = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert {"kind": "note", "text": "test: 2 of 20 rows taken from train, as it has no split"} in (
        documents
    )
    bits = [document["metrics"]["bits_per_byte"] for document in documents if "metrics" in document]
    assert bits[1] < bits[0] < 8.0
    (summary,) = [document for document in documents if document["kind"] == "summary"]
    assert [seed["blueprint"] for seed in summary["seeds"]] == ["block", "block"]


def test_text_task_runs_without_any_data_set() -> None:
    output = grow("text", "--epochs", "1", "--set", "threads=1").output
    bits = float(re.findall(r"bits_per_byte (\S+)", output)[0])
    assert 2.0 < bits < 5.0
    assert only_run().name.startswith("text-")


def test_run_folder_has_a_plain_name(pictures: Path) -> None:
    odd = pictures.rename(pictures.parent / "pic tures,äöü")
    grow(f"folder:{odd}", "--epochs", "1", "--quiet", "--set", "threads=1")
    assert re.fullmatch(r"folder-pic-tures-\d{8}-\d{6}-\d{6}", only_run().name)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("python:ring:TASK", "python-ring-TASK"),
        ("hf:uoft-cs/cifar100,image=img", "hf-uoft-cs-cifar100-image-img"),
        ("folder:/some/where/tables,text=body", "folder-tables-text-body"),
        (f"hf:{'long' * 40}", f"hf-{'long' * 20}"),
    ],
)
def test_a_runs_folder_has_a_name_that_every_file_system_takes(task: str, name: str) -> None:
    assert re.fullmatch(rf"compare-{name}-[\d-]+", new_folder(None, task, kind="compare-").name)


def test_a_run_of_a_folder_has_the_same_data_wherever_it_goes_on(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures.parent)
    kept = json.loads(grow("folder:pictures,samples=30", "--dry-run").output)
    assert kept["task"] == f"folder:{pictures},samples=30"
    monkeypatch.chdir(pictures)
    assert RunConfig.model_validate(kept).task == kept["task"]
    monkeypatch.setenv("HOME", str(pictures.parent))
    assert load_run_config("folder:~/pictures", None, [], {}).task == f"folder:{pictures}"


def test_argument_and_option_name_the_same_task() -> None:
    first, second = grow("digits", "--dry-run"), grow("--task", "digits", "--dry-run")
    assert json.loads(first.output) == json.loads(second.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the task is missing; name it once"),
        (("digits", "--task", "text"), "the task is given twice: digits, --task text"),
        (
            ("tex",),
            "did you mean 'text'? tasks: digits, teacher, text, text-large, text-xl, hf:NAME",
        ),
        (("ring:RING",), "did you mean 'python:ring:RING'?"),
        (("folder:nowhere",), "here/nowhere' does not exist"),
        (("folder:~nosuch/data",), "there is no home folder ~nosuch"),
        (("hf:~nosuch/data",), "there is no home folder ~nosuch"),
        (("digits", "--set", "task=text"), "task: 'digits' is named, and the settings are for"),
        (("hf:me/mine",), "data set 'me/mine' cannot be loaded: ConnectionError: Couldn't reach"),
    ],
)
def test_wrong_task_is_named_and_leaves_no_folder(arguments: tuple[str, ...], message: str) -> None:
    result = grow(*arguments, fails=True)
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "built", "message"),
    [
        ("targets", "targets=['stage9']", "has no module 'stage9'; did you mean "),
        ("batches", "batches=[]", "task 'python:lacks_batches:TASK' has no batches to train on"),
    ],
)
def test_what_a_task_lacks_is_named_and_leaves_no_folder(
    name: str, built: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = Path(f"lacks_{name}.py")
    file.write_text(LACKS_SOMETHING.format(built), encoding="utf-8")
    output = grow(f"python:{file.stem}:TASK", *SHORT, fails=True).output
    assert message in output
    assert not Path("runs").exists()


def test_sigterm_while_what_was_trained_is_judged_leaves_no_run_that_seems_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(_: GrowingRun) -> None:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(GrowingRun, "finish", judge)
    for command in (("grow", "digits", *SHORT, "--out", "run"), ("resume", "run")):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 128 + signal.SIGTERM, result.output
        assert "begin anew with" in result.output
        assert RunReader(Path("run")).status == "interrupted"


def test_where_a_run_is_is_told_as_it_is() -> None:
    output = grow("digits", "--epochs", "1", "--out", "a[lr]/x:smile:").output
    assert "run folder  a[lr]/x:smile:\n" in output
    assert "inspect 'a[lr]/x:smile:'\n" in output
    assert "report      a[lr]/x:smile:/report.html\n" in output


def test_data_that_fails_to_decode_leaves_no_folder(pictures: Path) -> None:
    (pictures / "dark" / "broken.png").write_bytes(b"no image")
    result = grow(f"folder:{pictures}", *SHORT, fails=True)
    assert "cannot be decoded" in result.output
    assert list(Path().iterdir()) == []


def test_missing_extra_is_named_with_its_remedy(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    open_source.cache_clear()
    assert "pip install 'esper-lite[data]'" in grow(f"folder:{pictures}", fails=True).output
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    load_splits.cache_clear()
    assert "pip install 'esper-lite[data]'" in grow("digits", *SHORT, fails=True).output
    assert list(Path().iterdir()) == []


def test_settings_of_a_data_set_can_be_set_like_any(pictures: Path) -> None:
    config = load_run_config(f"folder:{pictures}", None, ["learning_rate=0.1"], {})
    assert config.learning_rate == 0.1
    assert config.heuristic.blueprints == ("conv_heavy",)


def test_help_and_doctor_name_the_kinds_of_tasks() -> None:
    for command in (["grow", "--help"], ["doctor"]):
        output = " ".join(CliRunner().invoke(app, command).output.split())
        assert "hf:NAME" in output
        assert "folder:PATH" in output
    assert "label= and text= choose columns" in " ".join(
        CliRunner().invoke(app, ["grow", "--help"]).output.split()
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            ("heuristic.warmup_epochs=5",),
            "heuristic lets nothing germinate before epoch 5 (heuristic.warmup_epochs=5), and the "
            "run had 2; train for more --epochs, or --set other values\n",
        ),
        (
            ("policy=ucb1", "heuristic.warmup_epochs=0", "heuristic.plateau_epochs=1"),
            "ucb1 lets nothing germinate before epoch 2 (heuristic.plateau_epochs=1) nor after "
            "epoch 1 (heuristic.last_germination_fraction=0.7); ",
        ),
        (
            ("policy=ucb1", "trainer.decision_interval_steps=4", "heuristic.plateau_fraction=-9"),
            "ucb1 waits until the held-out loss falls by less than heuristic.plateau_fraction"
            "=-9 in heuristic.plateau_epochs=3 decisions\n",
        ),
        (("policy=none",), "the policy 'none' never grows\n"),
    ],
)
def test_why_nothing_germinated_is_said(settings: tuple[str, ...], why: str) -> None:
    asked = [part for setting in settings for part in ("--set", setting)]
    assert f"nothing germinated: {why}" in grow("digits", *SHORT, *asked, "--no-report").output


def test_a_network_that_was_tested_without_living_seeds_says_so() -> None:
    eager = ("heuristic.warmup_epochs=0", "heuristic.plateau_epochs=1", "trainer.epochs=3")
    settings = [part for setting in eager for part in ("--set", setting)]
    plateau = ("--set", "heuristic.plateau_fraction=1", "--set", "threads=1", "--no-report")
    output = grow("digits", *settings, *plateau).output
    assert "grown was tested without 1 seed still growing: only what is committed" in output


def test_a_run_whose_seeds_were_refused_as_linear_says_what_to_turn() -> None:
    eager = (
        *("slot.isolation=none", "slot.ramp_steps=1", "slot.thresholds.min_steps_at_target=1"),
        *("slot.thresholds.max_linear_share=1e-9", "heuristic.warmup_epochs=1"),
        *("heuristic.plateau_epochs=1", "heuristic.plateau_fraction=1", "heuristic.fade_steps=1"),
        *("heuristic.patience_epochs=2", "slot.thresholds.trial_epochs=1", "trainer.epochs=6"),
    )
    settings = [part for setting in eager for part in ("--set", setting)]
    output = grow("digits", *settings, "--set", "threads=1", "--no-report").output
    assert re.search(r"nothing was committed, and \d of \d seeds were refused for being", output)
    again = [part for setting in ADVICE for part in ("--set", setting)]
    output = grow("digits", *settings, *again, "--set", "threads=1", "--no-report").output
    assert "nothing was committed" not in output
