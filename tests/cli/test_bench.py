"""`esper bench`, as it is run in a terminal."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app

ARGUMENTS = ["bench", "teacher", "--block-steps", "1"]
HOST = ["host alone", "the same again", "dormant slots", "dormant, esper's loop"]
BAKED = "host with the seed baked in"
BEHIND = ["seed behind the host", "seed half blended in", "seed committed"]
WITHOUT_BATCHES = """
from dataclasses import replace
from esper.tasks.teacher import TEACHER


def build(random_seed):
    return replace(TEACHER.build(random_seed), batches=[])


TASK = replace(TEACHER, build=build)
"""


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        (["slot.isolation=none"], ["seed live", "seed committed"]),
        (["slot.isolation=shadowing"], BEHIND),
        (["slot.isolation=shadowing", "slot.objective=shadow"], BEHIND),
    ],
)
def test_each_network_computes_what_it_is_held_against(
    settings: list[str], stages: list[str]
) -> None:
    """But for a pass beside each step, in which a seed that learns in shadow does so."""
    asked = [*ARGUMENTS, "--slot", "stages.2", "--blueprint", "mlp_small", "--json"]
    run = CliRunner().invoke(app, [*asked, *(part for one in settings for part in ("--set", one))])
    assert run.exit_code == 0, run.output
    rows = {row["network"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert list(rows) == [*HOST, BAKED, *stages]
    for row in rows.values():
        if row["against"] is None:
            assert row["ratio"] is None
            continue
        plain = rows[row["against"]]
        assert row["against"] == (HOST[0] if row["network"] in HOST else BAKED)
        assert row["param_count"] == plain["param_count"]
        if row["network"] == "seed behind the host" and "slot.objective=shadow" in settings:
            assert row["flops"] > plain["flops"]
        elif row["network"] in ("seed behind the host", "seed half blended in"):
            assert rows[HOST[0]]["flops"] < row["flops"] <= plain["flops"]
        else:
            assert row["flops"] == plain["flops"]
        assert 0.0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert rows[BAKED]["param_count"] > rows[HOST[0]]["param_count"]
    assert rows[BAKED]["flops"] > rows[HOST[0]]["flops"]


def test_a_person_sees_a_table_with_what_it_was_measured_on() -> None:
    run = CliRunner(env={"COLUMNS": "80"}).invoke(app, ARGUMENTS)
    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    assert lines[0].startswith("teacher on cpu, torch ")
    assert "mlp in slot stages.0; 10 steps of each" in " ".join(run.stdout.split())
    told = [line.split("  ")[0 if line[0] != " " else 1] for line in lines[3:-1]]
    assert told == [*HOST, BAKED, "seed live", "seed committed"], "nothing is wrapped"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--slot", "stage.0"], "slot 'stage.0': the task's are 'stages.0', 'stages.1'"),
        (["--blueprint", "conv_light"], "'conv_light' does not fit slot 'stages.0'; those that do"),
        (["--blueprint", "block"], "'block' does not fit slot 'stages.0'; those that do"),
        (["--device", "tpu"], "device"),
        (["--set", "trainer.epochs=0"], "trainer.epochs"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(
    arguments: list[str], told: str
) -> None:
    run = CliRunner(env={"COLUMNS": "1000"}).invoke(app, [*ARGUMENTS, *arguments])
    assert run.exit_code == 2
    assert told in run.output


def test_a_task_without_batches_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("task_without_batches.py").write_text(WITHOUT_BATCHES, encoding="utf-8")
    run = CliRunner(env={"COLUMNS": "1000"}).invoke(
        app, ["bench", "python:task_without_batches:TASK"]
    )
    assert run.exit_code == 2
    assert "task 'python:task_without_batches:TASK' has no batches to train on" in run.output
