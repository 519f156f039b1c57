"""What becomes of a job's run: begun, gone on with, left alone, or waited for."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from esper.supervision.program import Run, RunState, clear_half_made, state_of
from esper.telemetry import RunStore
from esper.telemetry.run_folder import RunFolderError, RunStatus, WriterLock


def run_in(folder: Path, *, resume_stopped: bool = False) -> Run:
    return Run(folder=folder, resume=(), resume_stopped=resume_stopped)


def test_a_run_that_is_not_there_is_new(tmp_path: Path) -> None:
    assert state_of(run_in(tmp_path / "none")) == RunState.NEW
    assert state_of(run_in(tmp_path)) == RunState.NEW


@pytest.mark.parametrize(
    ("status", "state", "resumed"),
    [
        ("finished", RunState.FINISHED, RunState.FINISHED),
        ("stopped", RunState.STOPPED, RunState.UNFINISHED),
        ("interrupted", RunState.UNFINISHED, RunState.UNFINISHED),
        ("failed", RunState.UNFINISHED, RunState.UNFINISHED),
        ("running", RunState.UNFINISHED, RunState.UNFINISHED),
    ],
)
def test_a_run_that_is_there_goes_on_unless_it_is_complete_or_was_stopped(
    tmp_path: Path, status: RunStatus, state: RunState, resumed: RunState
) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    store.set_status(status)
    assert state_of(run_in(tmp_path / "run")) == RunState.BUSY
    store.close()
    assert state_of(run_in(tmp_path / "run")) == state
    assert state_of(run_in(tmp_path / "run", resume_stopped=True)) == resumed


def test_a_folder_that_cannot_be_read_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_text("no database, but a text of some length" * 100)
    with pytest.raises(RunFolderError, match="is damaged"):
        state_of(run_in(tmp_path))


def only_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"task": "dig')


def nothing_in_its_database(folder: Path) -> None:
    for name in ("config.json", "environment.json", ".lock"):
        (folder / name).touch()
    with closing(sqlite3.connect(folder / "run.sqlite")) as database:
        database.execute("PRAGMA journal_mode=WAL")


@pytest.mark.parametrize("begin", [only_config, nothing_in_its_database])
def test_a_run_that_a_process_was_killed_while_making_is_begun_anew(
    begin: Callable[[Path], None], tmp_path: Path
) -> None:
    begin(tmp_path)
    with pytest.raises(RunFolderError, match="holds a run already"):
        RunStore(tmp_path, config={}, environment={})
    assert state_of(run_in(tmp_path)) == RunState.NEW
    assert clear_half_made(tmp_path)
    RunStore(tmp_path, config={}, environment={}).close()
    assert state_of(run_in(tmp_path)) == RunState.UNFINISHED


def test_nothing_is_removed_that_may_be_of_use_to_somebody(tmp_path: Path) -> None:
    mine, written, whole = (tmp_path / name for name in ("mine", "written", "whole"))
    for folder in (mine, written):
        folder.mkdir()
        only_config(folder)
    (mine / "notes").touch()
    lock = WriterLock(written)
    RunStore(whole, config={}, environment={}).close()
    before = sorted(tmp_path.rglob("*"))
    assert not any(clear_half_made(folder) for folder in (mine, written, whole, tmp_path / "none"))
    assert sorted(tmp_path.rglob("*")) == before
    lock.release()
