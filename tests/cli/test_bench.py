"""`esper bench`, as it is run in a terminal."""

import json

import pytest
from typer.testing import CliRunner

from esper.cli.app import app

ARGUMENTS = ["bench", "teacher", "--block-steps", "1"]
HOST = ["host alone", "the same again", "dormant slots", "dormant, esper's loop"]
BAKED = "host with the seed baked in"


@pytest.mark.parametrize(
    ("isolation", "stages"),
    [
        ("none", ["seed live", "seed committed"]),
        ("shadowing", ["seed behind the host", "seed half blended in", "seed committed"]),
    ],
)
def test_each_network_computes_what_it_is_held_against(isolation: str, stages: list[str]) -> None:
    asked = [*ARGUMENTS, "--slot", "stages.2", "--blueprint", "mlp_small", "--json"]
    run = CliRunner().invoke(app, [*asked, "--set", f"slot.isolation={isolation}"])
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
        if row["network"] in ("seed behind the host", "seed half blended in"):
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
