"""`esper grow --policy schedule`: a run like any other, with settings that are checked first."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from esper.cli.app import app
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import prepare
from esper.experiments.settings import SettingsError
from esper.lifecycle.events import RunFinished, SeedGerminated
from esper.telemetry import GROWN_FOLDER, RunReader

SCHEDULE = {"policy": "schedule"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def esper(*arguments: str, fails: bool = False) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (2 if fails else 0), result.output
    return result.output


def configured(*settings: str, task: str = "text") -> RunConfig:
    return load_run_config(task, None, settings, SCHEDULE)


def test_a_decoder_grown_by_schedule_is_a_run_like_any_other() -> None:
    esper("grow", "text", "--policy", "schedule", "--epochs", "2", "--out", "run", "--quiet")
    reader = RunReader(Path("run"))
    assert reader.status == "finished"
    grown = [record for record in reader.events() if isinstance(record.event, SeedGerminated)]
    assert [(record.epoch, record.event.slot, record.event.options) for record in grown] == [
        (1, "blocks.0", {"depth": 2}),
        (1, "blocks.1", {"depth": 2}),
    ]
    weights = load_file(Path("run") / GROWN_FOLDER / "model.safetensors")
    finished = reader.events()[-1].event
    assert isinstance(finished, RunFinished)
    assert sum(weight.numel() for weight in weights.values()) == finished.param_count
    assert re.search(r"blocks.1 +block +99,968", esper("inspect", "run"))
    esper("report", "run", "--png", "run.png")
    assert Path("run.png").stat().st_size > 20_000


def test_every_bundled_task_has_a_schedule_that_its_host_can_carry_out() -> None:
    for task in ("digits", "text"):
        run = prepare(configured(task=task))
        assert run.growth.policy.name == "schedule"


def test_settings_reach_the_policy() -> None:
    config = configured(
        "growth_schedule.fractions=[0.2, 0.45]", 'growth_schedule.options.source="own"'
    )
    policy = prepare(config).growth.policy
    assert policy.config.fractions == (0.2, 0.45)
    assert policy.config.options == {"source": "own"}


@pytest.mark.parametrize(
    ("setting", "decisions"),
    [
        ("trainer.decision_interval_steps=5", 1120),
        ("trainer.decision_interval_steps=7", 800),
        ("trainer.accumulation_steps=2", 56),
        ("threads=1", 56),
    ],
)
def test_the_policy_knows_how_many_decisions_will_come(setting: str, decisions: int) -> None:
    assert prepare(configured(setting)).growth.max_epochs == decisions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("schedule=cosine",), "schedule=cosine falls from the first step"),
        (
            ("decay_fraction=0.8",),
            "growth_schedule.fractions: at 0.25 the learning rate is falling already, with "
            "decay_fraction=0.8 it is stable up to 0.2 of the run",
        ),
        (("growth_schedule.fractions=[0.5, 0.2]",), "growth_schedule: fractions must rise"),
        (("growth_schedule.factors=2",), "did you mean 'growth_schedule.factor'"),
        (("slot.thresholds.trial_epochs=6",), "every seed would be pruned before its trial"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        configured(*settings)
    assert message in str(refused.value)
    # Another policy does not grow by this schedule.
    if settings[0].startswith(("schedule", "decay")):
        load_run_config("text", None, settings, {"policy": "heuristic"})


@pytest.mark.parametrize(
    "settings", [("schedule=constant", "decay_fraction=0.8"), ("decay_fraction=0.75",)]
)
def test_growth_up_to_the_end_of_the_stable_phase_is_accepted(settings: tuple[str, ...]) -> None:
    assert configured(*settings).growth_schedule.fractions == (0.25,)


def test_a_plan_that_does_not_fit_the_host_is_told_before_training() -> None:
    settings = ("--set", "growth_schedule.blueprint=mlp", "--policy", "schedule")
    output = esper("grow", "text", *settings, "--out", "run", fails=True)
    assert "growth_schedule: the schedule asks for 2 blocks in one seed, and blueprint" in output
    assert not Path("run").exists()


def test_the_policy_of_the_task_decides_where_none_is_named() -> None:
    printed = json.loads(esper("grow", "digits", "--dry-run"))
    assert printed["policy"] == "heuristic"
    assert printed["growth_schedule"]["blueprint"] == "conv_heavy"
