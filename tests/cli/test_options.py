"""What several commands are asked in the same words, they answer in the same words."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from esper import __version__
from esper.cli.app import app
from esper.experiments.config import load_run_config
from esper.telemetry import RunStore

WRITERS = [("grow",), ("compare",), ("policy", "train"), ("policy", "eval")]
BEGUN_BEFORE = [("compare",), ("policy", "train")]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


def esper(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def refused(*arguments: str) -> str:
    """What is said where nothing is made, as one line without its frame."""
    before = sorted(Path().rglob("*"))
    result = esper(*arguments)
    assert result.exit_code == 2, result.output
    assert sorted(Path().rglob("*")) == before
    assert "pydantic" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def test_the_version_is_told() -> None:
    assert esper("--version").output == f"esper {__version__}\n"


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("out", ["file", "file/deeper/run"])
def test_a_folder_that_cannot_be_one_is_refused(command: tuple[str, ...], out: str) -> None:
    Path("file").write_text("mine", encoding="utf-8")
    told = refused(*command, "digits", "--out", out)
    assert f"{out} can be no folder: " in told
    assert "file is a file" in told


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize(
    "out",
    [300 * "x", f"{300 * 'x'}/deeper", "/proc/deeper/run"],
    ids=["too long", "in what is too long", "no place for folders"],
)
def test_a_folder_that_the_system_refuses_is_refused(
    command: tuple[str, ...], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert f"{out} cannot be made: " in refused(*command, "digits", "--out", out)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learning_rate=nan", "learning_rate: Input should be a finite number"),
        ("learning_rate=inf", "learning_rate: Input should be a finite number"),
        ("learning_rate=0", "learning_rate: Input should be greater than 0"),
        ("weight_decay=inf", "weight_decay: Input should be a finite number"),
        ("weight_decay=-1e-9", "weight_decay: Input should be greater than or equal to 0"),
        (f"random_seed={2**64}", "random_seed: Input should be less than"),
        (f"random_seed={-(2**63) - 1}", "random_seed: Input should be greater than or equal to"),
    ],
)
def test_settings_that_no_run_could_have_are_refused(setting: str, words: str) -> None:
    assert words in refused("grow", "digits", "--set", setting, "--dry-run")


@pytest.mark.parametrize("command", [("compare",), ("policy", "eval")])
def test_seeds_that_no_run_could_have_are_refused(command: tuple[str, ...]) -> None:
    told = refused(*command, "digits", "--seeds", "2", "--first-seed", str(2**64 - 1))
    assert "random_seeds.1: Input should be less than 18446744073709551616" in told


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_is_not_ones_own_is_refused(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    told = refused(*command, "digits", "--out", "deeper/run")
    assert "deeper/run cannot be written: " in told
    assert "is not yours to write in" in told


@pytest.mark.parametrize("command", BEGUN_BEFORE)
def test_what_goes_on_is_named_by_its_folder_and_keeps_its_settings(
    command: tuple[str, ...],
) -> None:
    assert "name a task, or a folder to go on in: --out FOLDER" in refused(*command)
    assert "name a task to begin" in refused(*command, "--out", "nowhere")
    changed = refused(*command, "--out", "nowhere", "--epochs", "3", "--set", "threads=1")
    assert "goes on with its own settings, and --epochs, --set would change them" in changed


@pytest.mark.parametrize("command", [("resume", "run"), ("send", "run", "pause")])
def test_settings_of_another_version_are_named(command: tuple[str, ...]) -> None:
    config = load_run_config("digits", None, [], {}).model_dump(mode="json")
    del config["learning_rate"]
    RunStore(Path("run"), config={**config, "of_tomorrow": 1}, environment={}).close()
    told = refused(*command)
    assert "run holds no settings that this version of esper reads: " in told
    assert "learning_rate: Field required" in told
    assert "unknown key 'of_tomorrow'" in told


@pytest.mark.parametrize("command", [("resume", "run"), ("send", "run", "pause")])
def test_the_run_of_a_loop_of_ones_own_is_called_that(command: tuple[str, ...]) -> None:
    RunStore(Path("run"), config={"task": "mine"}, environment={}).close()
    told = refused(*command)
    assert "run was written by a loop of your own, not by esper grow" in told
    assert "start your script again (docs/checkpoints.md)" in told
    assert "Field required" not in told


@pytest.mark.parametrize("command", [*WRITERS, ("bench",)])
def test_a_dry_run_is_one_line_of_json_where_lines_of_json_are_asked_for(
    command: tuple[str, ...],
) -> None:
    result = esper(*command, "digits", "--dry-run", "--json")
    (line,) = result.output.splitlines()
    assert json.loads(line) == json.loads(esper(*command, "digits", "--dry-run").output)
