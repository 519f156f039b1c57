"""`esper inspect` of a run that other people's words are in."""

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app
from esper.lifecycle.events import RunFinished, RunStarted, SeedPruned, TwinFinished
from esper.lifecycle.stages import SeedStage
from esper.telemetry import RunStore
from served_runs import CONFIG, publish, skip, write_life

MARKUP = "[router] of [/tmp/sock] is :key:"


@pytest.mark.parametrize("columns", [60, 300])
def test_what_a_run_says_is_shown_as_it_is(tmp_path: Path, columns: int) -> None:
    config = {**CONFIG, "task": f"task {MARKUP}", "policy": f"policy {MARKUP}", "device": "cpu"}
    store = RunStore(tmp_path / "run", config=config, environment={"device": f"device {MARKUP}"})
    slot = f"slot {MARKUP}"
    publish(store, 0, RunStarted(run_id="run", slots=(slot,), host_param_count=1000))
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
    publish(store, 0, RunStarted(run_id="run", slots=("a",), host_param_count=1000))
    publish(store, 4, RunFinished(metrics={"loss": loss}, param_count=1000))
    twin = TwinFinished(
        metrics={"loss": twins}, param_count=1000, epochs=4, shared_steps=3, flops_fraction=1.0
    )
    publish(store, 4, twin)
    store.close()
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert told in " ".join(shown.output.split())
