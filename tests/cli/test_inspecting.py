"""`esper inspect` of a run that other people's words are in."""

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app
from esper.lifecycle.events import (
    Event,
    EventRecord,
    RunFinished,
    RunStarted,
    RunWentBack,
    SeedPruned,
    StepSkipped,
    TwinFinished,
)
from esper.lifecycle.stages import SeedStage
from esper.telemetry import RunStore
from served_runs import CONFIG, publish, skip, write_life, write_run

MARKUP = "[router] of [/tmp/sock] is :key:"


@pytest.mark.parametrize("columns", [60, 300])
def test_what_a_run_says_is_shown_as_it_is(tmp_path: Path, columns: int) -> None:
    config = {**CONFIG, "task": f"task {MARKUP}", "policy": f"policy {MARKUP}", "device": "cpu"}
    store = RunStore(tmp_path / "run", config=config, environment={"device": f"device {MARKUP}"})
    slot = f"slot {MARKUP}"
    publish(store, 0, RunStarted(slots=(slot,), host_param_count=1000))
    skip(store, 1, f"skipped {MARKUP}")
    write_life(store, slot=slot, epoch=2)
    publish(
        store,
        4,
        SeedPruned(
            slot=slot,
            blueprint="conv_light",
            from_stage=SeedStage.BLENDING,
            reason=f"pruned {MARKUP}",
        ),
    )
    store.close()
    shown = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    told = " ".join(shown.output.split())
    for word in ("task", "policy", "device", "skipped", "slot", "pruned"):
        assert f"{word} {MARKUP}" in told


def test_a_run_on_a_bus_is_told_by_what_it_is_called_there_and_no_other(tmp_path: Path) -> None:
    for name, bus in (("on", {"commands": "unix:/tmp/sock"}), ("off", {"commands": None})):
        store = RunStore(tmp_path / name, config={**CONFIG, "bus": bus}, environment={})
        store.close()
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / name)])
        assert (f"on a bus as {store.run_id}" in shown.output) == (name == "on")


def test_what_a_run_in_somebodys_own_loop_did_not_tell_is_left_out(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config={"task": "my lm"}, environment={})
    write_life(store, slot="layers.0", epoch=2, until="committed")
    store.close()
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    head, life, _ = shown.output.split("\n\n")
    assert head == "my lm · killed"
    assert life.splitlines()[-1].split() == ["epoch", "4", "committed"]


def test_a_run_that_decides_every_so_many_steps_is_told_in_decisions(tmp_path: Path) -> None:
    write_run(tmp_path / "run", trainer={"epochs": 3, "decision_interval_steps": 10})
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert "  decision   4  committed" in shown.output
    assert "params  decisions  outcome" in shown.output
    assert shown.output.count("epoch") == 1, "of the settings"


def _at(store: RunStore, step: int, event: Event) -> None:
    store.publish(EventRecord(time_seconds=0.0, epoch=0, step=step, event=event))


def _protected(folder: Path) -> list[str]:
    """What inspect tells between the run's figures and its seeds."""
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.output
    head, _, _ = shown.output.partition("\n\n")
    return head.splitlines()[3:]


def test_what_a_run_was_protected_from_is_told_in_order_and_repeats_once(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config=CONFIG, environment={})
    publish(store, 0, RunStarted(slots=("a",), host_param_count=1000))
    for again in (True, False, None):
        for step in (1, 2, 3):
            _at(store, step, StepSkipped(reason="the loss is not finite", value=math.nan))
        if again is not None:
            _at(store, 4, RunWentBack(from_step=4, to_step=0, same_batches=again))
    _at(store, 5, StepSkipped(reason="the loss is above 3", value=9.0))
    store.close()
    skipped = "3 steps skipped, 1 to 3: the loss is not finite"
    back = "step 4: steps in a row were bad: from 4 back to 0"
    last = "step 5 skipped: the loss is above 3"
    assert _protected(tmp_path / "run") == [skipped, back, skipped, back, skipped, last]


def test_of_many_interventions_the_last_are_told_and_how_many_there_were(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config=CONFIG, environment={})
    publish(store, 0, RunStarted(slots=("a",), host_param_count=1000))
    for step in range(1, 41):
        _at(store, step, StepSkipped(reason=f"the loss is above {step}", value=99.0))
    store.close()
    first, *lines = _protected(tmp_path / "run")
    assert first == "30 earlier interventions; --json has all"
    assert lines == [f"step {step} skipped: the loss is above {step}" for step in range(31, 41)]


@pytest.mark.parametrize(
    ("loss", "twins", "told"),
    [
        (0.9, 1.0, "growth paid in this run: test loss 0.9000, its twin's 1.0000 (-10.0%)"),
        (-1.2, -1.0, "growth paid in this run: test loss -1.2000, its twin's -1.0000 (-20.0%)"),
        (0.1, 0.0, "growth did not pay in this run: test loss 0.1000, its twin's 0.0000 the"),
        (math.nan, 1.0, "whether growth paid in this run cannot be told: test loss nan"),
    ],
)
def test_a_twin_is_compared_whatever_its_loss(
    tmp_path: Path, loss: float, twins: float, told: str
) -> None:
    store = RunStore(tmp_path / "run", config={**CONFIG, "task": "digits"}, environment={})
    publish(store, 0, RunStarted(slots=("a",), host_param_count=1000))
    publish(store, 4, RunFinished(metrics={"loss": loss}, param_count=1000))
    twin = TwinFinished(
        metrics={"loss": twins}, param_count=1000, epochs=4, shared_steps=3, flops_fraction=1.0
    )
    publish(store, 4, twin)
    store.close()
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert told in " ".join(shown.output.split())
