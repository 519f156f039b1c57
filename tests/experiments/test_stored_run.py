"""A run in a folder: whoever goes on with it takes nothing from it."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from esper.bus.mirror import Mirror
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import GrowingRun, build_setup, prepare
from esper.experiments.stored_run import resumed_run, stored_run
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


def test_a_run_that_cannot_go_on_does_not_tell_that_it_begins(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path, after_epoch=2)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "policy": "none"}))
    with pytest.raises(CheckpointError, match="policy"), resumed_run(tmp_path):
        pass
    told = [record.event.type for record in RunReader(tmp_path).events()]
    assert told.count("run_started") == 1
    assert told[-1] == "run_failed"


def test_a_mirror_is_refused_before_its_settings_are_looked_at(tmp_path: Path) -> None:
    """They may not have come."""
    Mirror(tmp_path / "run").close()
    with pytest.raises(RunFolderError, match="is a mirror"), resumed_run(tmp_path / "run"):
        pass
