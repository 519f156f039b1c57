"""A run in a folder: whoever goes on with it takes nothing from it."""

import json
import shutil
from contextlib import AbstractContextManager
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
        ({"policy": "none"}, CheckpointError, "'heuristic', and is 'none' here"),
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


def begin(folder: Path) -> None:
    """Begin a run in a folder, and break it off at once."""
    config = load_run_config("digits", None, [], {"trainer": {"epochs": 1}})
    with stored_run(config, folder, build_setup(config)):
        raise RuntimeError("it has begun")


def test_a_run_does_not_begin_beside_checkpoints_of_another_and_would_go_on_from_them(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path)
    for name in ("run.sqlite", "config.json", "environment.json"):
        (tmp_path / name).unlink()
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(RunFolderError, match=r"checkpoints holds step-0+20 of another run, .*"):
        begin(tmp_path)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("there", "error", "why"),
    [
        ({"checkpoints": "mine"}, CheckpointError, "cannot be written"),
        ({"grown/notes.txt": "mine"}, RunFolderError, "grown network: .* not saved by esper"),
        ({"grown/manifest.json": "mine"}, RunFolderError, "grown network: .* is damaged"),
    ],
)
def test_what_stands_where_a_run_would_write_is_refused_before_it_begins_and_stays_alone(
    there: dict[str, str], error: type[Exception], why: str, tmp_path: Path
) -> None:
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=why):
        begin(tmp_path)
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path).as_posix(): path.read_text() for path in files} == there


def end(opened: AbstractContextManager[GrowingRun], *, notes: Path | None = None) -> None:
    """Train a run to its end, where there may be notes by then."""
    with opened as run:
        assert list(run.reports)
        if notes is not None:
            notes.parent.mkdir()
            notes.write_text("mine")
        run.finish()


def test_a_run_whose_network_cannot_be_kept_says_so_and_ends_once_it_can(tmp_path: Path) -> None:
    config = load_run_config("digits", None, [], {"trainer": {"epochs": 1}})
    notes = tmp_path / "grown" / "notes.txt"
    with pytest.raises(RunFolderError, match=r"cannot be kept: .* not saved by .*esper resume"):
        end(stored_run(config, tmp_path, build_setup(config)), notes=notes)
    assert RunReader(tmp_path).status == "failed"
    with pytest.raises(RunFolderError, match="the grown network: "):
        end(resumed_run(tmp_path))
    notes.parent.rename(tmp_path / "mine")
    end(resumed_run(tmp_path))
    assert RunReader(tmp_path).status == "finished"
