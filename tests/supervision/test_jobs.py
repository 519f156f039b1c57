"""What becomes of a job's run: begun, gone on with, left alone, or waited for."""

from pathlib import Path

import pytest

from esper.supervision.program import Run, RunState, state_of
from esper.telemetry import RunStore
from esper.telemetry.run_store import RunFolderError, RunStatus


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
