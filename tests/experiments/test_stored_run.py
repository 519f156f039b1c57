"""A run in a folder: whoever goes on with it takes nothing from it."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from esper.bus.mirror import Mirror
from esper.experiments.config import CheckpointConfig, RunConfig, load_run_config
from esper.experiments.run import GrowingRun, build_setup, num_steps, prepare
from esper.experiments.settings import SettingsError
from esper.experiments.stored_run import resumed_run, stored_run
from esper.lifecycle.events import RunResumed
from esper.telemetry import RunFolderError, RunReader
from esper.telemetry.run_store import ReopenedRunStore
from esper.training import CheckpointError


def stop(folder: Path, *, after_epoch: int = 1) -> None:
    settings = {"trainer": {"epochs": after_epoch + 1}, "checkpoint": {"min_seconds": 0.0}}
    config = load_run_config("digits", None, [], settings)
    with stored_run(config, folder, build_setup(config)) as run:
        reports = run.reports
        for _ in range(after_epoch):
            next(reports)
        raise KeyboardInterrupt


def test_a_run_that_finishes_while_another_is_about_to_resume_it_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path)
    events = RunReader(tmp_path).events()
    assert events

    def finished_meanwhile(config: RunConfig, **settings: Any) -> GrowingRun:
        other = ReopenedRunStore(tmp_path, after_step=10**9)
        other.set_status("finished")
        other.close()
        return prepare(config, **settings)

    module = import_module("esper.experiments.stored_run")
    monkeypatch.setattr(module, "prepare", finished_meanwhile)
    with pytest.raises(RunFolderError, match="is finished"), resumed_run(tmp_path):
        pass
    assert RunReader(tmp_path).events() == events
    assert RunReader(tmp_path).status == "finished"


def kept(folder: Path) -> tuple[object, ...]:
    """Return what a folder says of its run."""
    reader = RunReader(folder)
    return reader.standing, reader.attempt, reader.events(), reader.metrics()


@pytest.mark.parametrize(
    ("changed", "error", "why"),
    [
        ({"policy": "none"}, CheckpointError, "policy"),
        ({"bus": {"commands": "nowhere"}}, SettingsError, "bus"),
        ({"tracking": {"tensorboard": True}}, SettingsError, "tensorboard"),
    ],
    ids=["another policy", "no bus", "a tool that cannot follow"],
)
def test_a_run_that_cannot_go_on_is_left_as_it_was_and_goes_on_later(
    changed: dict[str, Any], error: type[Exception], why: str, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path, after_epoch=2)
    older, newest = sorted((tmp_path / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)  # so that there is something to forget
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    before = kept(tmp_path)
    file = tmp_path / "config.json"
    settings = file.read_text()
    file.write_text(json.dumps({**json.loads(settings), **changed}))
    with pytest.raises(error, match=why), resumed_run(tmp_path):
        pass
    assert kept(tmp_path) == before
    file.write_text(settings)
    with resumed_run(tmp_path):
        standing, attempt, events, _ = kept(tmp_path)
        assert (standing, attempt) == ("running", 2)
    told = [record.event for record in events]
    assert told[-1] == RunResumed(name=older.name)
    assert [event.type for event in told].count("run_started") == 1
    assert len(told) < len(before[2])


def test_a_decision_after_the_newest_checkpoint_and_at_its_step_is_told_once(
    tmp_path: Path,
) -> None:
    config = load_run_config("digits", None, [], {"trainer": {"epochs": 3}})
    steps = num_steps(config, build_setup(config)) // 3
    config = config.model_copy(update={"checkpoint": CheckpointConfig(interval_steps=steps)})

    def told(folder: Path, *, epochs: int) -> None:
        with stored_run(config, folder, build_setup(config)) as run:
            for report in run.reports:
                if report.epoch == epochs:
                    raise KeyboardInterrupt

    def written(folder: Path) -> list[tuple[int, int, str]]:
        losses = (one for one in RunReader(folder).metrics() if one.name.endswith("loss"))
        return [(one.epoch, one.step, one.name) for one in losses]

    told(tmp_path / "whole", epochs=0)
    with pytest.raises(KeyboardInterrupt):
        told(tmp_path / "cut", epochs=2)
    with resumed_run(tmp_path / "cut") as run:
        assert run.resumed is not None
        assert run.resumed.info.step == 2 * steps
        assert list(run.reports)
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


def test_a_mirror_is_refused_before_its_settings_are_looked_at(tmp_path: Path) -> None:
    """They may not have come."""
    Mirror(tmp_path / "run").close()
    with pytest.raises(RunFolderError, match="is a mirror"), resumed_run(tmp_path / "run"):
        pass
