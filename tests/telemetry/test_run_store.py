"""The run folder: what is written can be read, by anyone, also while the run goes on."""

import fcntl
import math
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from bus_machinery import KEYRING
from esper.bus.envelope import Sealer
from esper.bus.mirror import Mirror
from esper.bus.mirrors import check_name
from esper.lifecycle.events import EventRecord, RunStarted, SeedPruned, StepSkipped
from esper.lifecycle.stages import SeedStage
from esper.report import run_page
from esper.telemetry import DATABASE_FILE, RunFolderError, RunReader, RunStore, run_store
from esper.telemetry.run_folder import LOCK_FILE, RunStatus, WriterLock, is_written
from esper.telemetry.run_reader import RunGlance
from esper.telemetry.run_store import ReopenedRunStore
from processes import kill_after

ROOT = Path(__file__).parents[2]

PRUNED = EventRecord(
    time_seconds=1.5,
    epoch=2,
    step=30,
    event=SeedPruned(
        slot="layer", blueprint="norm", from_stage=SeedStage.TRAINING, reason="no use"
    ),
)
SKIPPED = EventRecord(
    time_seconds=2.5, epoch=2, step=31, event=StepSkipped(reason="bad loss", value=math.nan)
)

WRITER = """
import sys, time
from contextlib import suppress
from pathlib import Path
from esper.lifecycle.events import EventRecord, RunFinished
from esper.telemetry import RunStore
store = RunStore(Path(sys.argv[1]), config={}, environment={})
event = RunFinished(metrics={}, param_count=1)
for epoch in range(1, 4):
    store.publish(EventRecord(time_seconds=0.0, epoch=epoch, step=epoch, event=event))
    store.measure(epoch, epoch, {"loss": 1.0 / epoch, "accuracy": 0.5})
    print(epoch, flush=True)
time.sleep(600)
"""
LOCKING = """
import os, sys, time
from contextlib import suppress
from pathlib import Path
from esper.telemetry.run_folder import WriterLock, is_written
folder = Path(sys.argv[1])
lock = WriterLock(folder)
"""


def open_store(folder: Path) -> RunStore:
    return RunStore(folder, config={"task": "digits"}, environment={"device": "cpu"})


def test_what_was_published_is_read_back_in_order(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    store.publish(PRUNED)
    store.publish(SKIPPED)
    store.measure(2, 31, {"loss": math.nan, "accuracy": 0.5})
    store.set_status("finished")
    store.close()
    reader = RunReader(tmp_path / "run")
    assert reader.status == "finished"
    assert reader.config() == {"task": "digits"}
    assert reader.environment() == {"device": "cpu"}
    first, second = reader.events()
    assert first == PRUNED
    assert isinstance(second.event, StepSkipped)
    assert math.isnan(second.event.value)
    loss, accuracy = reader.metrics()
    assert math.isnan(loss.value)
    assert (accuracy.name, accuracy.value, accuracy.epoch, accuracy.step) == (
        "accuracy",
        0.5,
        2,
        31,
    )


def test_a_folder_may_be_named_as_text(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    RunStore(folder, config={}, environment={}).close()
    ReopenedRunStore(folder, after_step=0).close()
    assert RunReader(folder).folder == Path(folder)


@pytest.mark.parametrize("document", ["config", "environment"])
def test_what_json_has_no_word_for_is_named(document: str, tmp_path: Path) -> None:
    given = {"config": {}, "environment": {}, document: {"device": "cpu", "of": {"layer": object}}}
    with pytest.raises(TypeError, match=rf"^'of' cannot be kept in {document}\.json: .* type"):
        RunStore(tmp_path, **given)


@pytest.mark.parametrize(
    "name",
    [255 * "x", 127 * "é", 85 * "試", ".hidden", "...", "a\\b", "a\nb", os.fsdecode(b"caf\xe9")],
    ids=range(8),
)
def test_a_run_of_any_name_has_an_id_that_the_bus_and_folders_elsewhere_take(
    name: str, tmp_path: Path
) -> None:
    store = open_store(tmp_path / name)
    store.close()
    Sealer(KEYRING, store.run_id)
    check_name(store.run_id)


def test_run_is_read_while_it_goes_on_and_each_row_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    reader = RunReader(tmp_path)
    assert (reader.status, reader.attempt, reader.is_written) == ("running", 1, True)
    assert reader.standing == "running"
    store.publish(PRUNED)
    (first,) = reader.event_rows()
    store.measure(1, 1, {"loss": 1.0})
    (metric,) = reader.metrics()
    store.publish(SKIPPED)
    store.publish(PRUNED)
    store.measure(2, 2, {"loss": 2.0})
    assert [row.record.event.type for row in reader.event_rows(after=first.id, limit=1)] == [
        "step_skipped"
    ]
    assert len(reader.event_rows(after=first.id)) == 2
    pruned = reader.event_rows(types=["seed_pruned", "seed_committed"])
    assert [row.record for row in pruned] == [PRUNED, PRUNED]
    assert [row.value for row in reader.metrics(after=metric.id)] == [2.0]
    store.close()
    assert not reader.is_written


def test_glance_says_how_a_run_stands_without_its_events(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    reader = RunReader(tmp_path)
    assert reader.glance() == RunGlance(
        status="running",
        attempt=1,
        is_mirror=False,
        event_counts={},
        first_seconds=None,
        last_seconds=None,
        epoch=0,
        step=0,
    )
    for record in (PRUNED, SKIPPED, SKIPPED):
        store.publish(record)
    store.measure(3, 45, {"loss": 1.0, "accuracy": 0.5})
    store.set_status("finished")
    store.close()
    assert reader.glance() == RunGlance(
        status="finished",
        attempt=1,
        is_mirror=False,
        event_counts={"seed_pruned": 1, "step_skipped": 2},
        first_seconds=1.5,
        last_seconds=2.5,
        epoch=3,
        step=45,
    )


def test_metrics_of_one_name_are_read_by_themselves(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for epoch in (1, 2, 3):
        store.measure(epoch, 10 * epoch, {"loss": 1.0 / epoch, "accuracy": 0.5})
    store.close()
    first, *others = RunReader(tmp_path).metrics(name="loss")
    assert [row.value for row in (first, *others)] == [1.0, 0.5, 1.0 / 3.0]
    assert RunReader(tmp_path).metrics(name="loss", after=first.id) == others


def test_metrics_are_kept_as_numbers_and_what_is_none_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    store.measure(1, 10, {"loss": np.float32(0.5), "accuracy": torch.tensor(0.25)})
    with pytest.raises(TypeError, match="metric 'accuracy' must be a number, got a NoneType"):
        store.measure(2, 20, {"loss": 1.0, "accuracy": None})
    store.close()
    rows = RunReader(tmp_path / "run").metrics()
    assert [(row.name, row.value) for row in rows] == [("loss", 0.5), ("accuracy", 0.25)]


def test_resumed_run_says_that_rows_may_be_gone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.publish(PRUNED)
    store.publish(SKIPPED)
    store.measure(2, 31, {"loss": 1.0})
    store.set_status("failed")
    store.close()
    ReopenedRunStore(tmp_path, after_step=30).close()
    reader = RunReader(tmp_path)
    assert (reader.status, reader.attempt) == ("running", 2)
    assert (len(reader.events()), reader.metrics()) == (1, [])


@pytest.mark.parametrize(("after_step", "step"), [(30, 0), (-1, 31)])
def test_a_run_that_goes_on_begins_once(after_step: int, step: int, tmp_path: Path) -> None:
    started = RunStarted(slots=("conv1",), host_param_count=10)
    begun = EventRecord(time_seconds=1.0, epoch=0, step=0, event=started)
    with open_store(tmp_path) as store:
        store.publish(begun)
    with ReopenedRunStore(tmp_path, after_step=after_step) as store:
        store.publish(begun.model_copy(update={"step": 31}))
    assert [record.step for record in RunReader(tmp_path).events()] == [step]


def test_a_run_that_has_finished_meanwhile_is_left_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.publish(PRUNED)
    store.set_status("finished")
    store.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match="is finished; there is nothing to resume"):
        ReopenedRunStore(tmp_path, after_step=-1, unfinished=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not is_written(tmp_path)
    ReopenedRunStore(tmp_path, after_step=-1).close()  # a training may go on still
    assert RunReader(tmp_path).events() == []


def test_a_mirror_of_a_run_elsewhere_is_left_alone(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "run")
    mirror.publish(PRUNED)
    mirror.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunFolderError, match="is a mirror of a run elsewhere"):
        ReopenedRunStore(tmp_path / "run", after_step=-1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_killed_run_loses_nothing_that_it_was_given(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout as output:
        while output.readline() != "3\n":
            pass
        assert RunReader(tmp_path).is_written
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    reader = RunReader(tmp_path)
    assert [record.epoch for record in reader.events()] == [1, 2, 3]
    assert [row.value for row in reader.metrics() if row.name == "loss"] == [1.0, 0.5, 1.0 / 3.0]
    assert (reader.status, reader.is_written, reader.standing) == ("running", False, "killed")


def ended_by(error: BaseException) -> BaseException:
    """Return what Lightning raises for an error, as for Ctrl-C."""
    ending = SystemExit(1)
    ending.__context__ = error
    return ending


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError(), "failed"),
        (SystemExit(1), "failed"),
        (ended_by(KeyboardInterrupt()), "interrupted"),
        (ended_by(ValueError()), "failed"),
    ],
)
def test_a_store_that_is_left_says_how_the_run_has_ended(
    error: BaseException | None, status: str, tmp_path: Path
) -> None:
    with suppress(KeyboardInterrupt, ValueError, SystemExit), open_store(tmp_path) as store:
        store.publish(PRUNED)
        assert RunReader(tmp_path).standing == "running"
        if error is not None:
            raise error
    reader = RunReader(tmp_path)
    assert (reader.standing, reader.is_written) == (status, False)


def test_a_closed_run_is_one_file_and_reading_it_makes_no_other(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.publish(PRUNED)
    assert (tmp_path / "run.sqlite-wal").exists()
    store.close()
    before = {path.name for path in tmp_path.iterdir()}
    assert before == {"run.sqlite", "config.json", "environment.json", ".lock"}
    reader = RunReader(tmp_path)
    assert len(reader.events()) == 1
    assert not reader.is_written
    assert {path.name for path in tmp_path.iterdir()} == before
    ReopenedRunStore(tmp_path, after_step=30).close()
    assert len(reader.events()) == 1


def test_closing_does_not_wait_for_who_reads(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.publish(PRUNED)
    reading = sqlite3.connect(tmp_path / DATABASE_FILE)
    reading.execute("BEGIN")
    assert reading.execute("SELECT count(*) FROM events").fetchone() == (1,)
    store.close()
    reading.close()
    assert len(RunReader(tmp_path).events()) == 1


def test_a_run_that_cannot_be_gone_on_with_or_closed_well_is_let_go(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    database = sqlite3.connect(tmp_path / DATABASE_FILE)
    database.execute("ALTER TABLE metrics RENAME TO elsewhere")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        ReopenedRunStore(tmp_path, after_step=0)
    assert not RunReader(tmp_path).is_written
    database.execute("ALTER TABLE elsewhere RENAME TO metrics")
    database.close()
    store = ReopenedRunStore(tmp_path, after_step=0)
    (tmp_path / DATABASE_FILE).write_bytes(b"damaged" * 2000)
    with pytest.raises(sqlite3.DatabaseError):
        store.close()
    assert not is_written(tmp_path)


def test_a_lock_ends_with_the_process_that_took_it_whatever_that_has_forked(tmp_path: Path) -> None:
    """A worker that loads data lives on for seconds."""
    forking = """
if not os.fork():
    print("forked", os.getpid(), flush=True)
    os.close(1)
    os.close(2)
time.sleep(100)
"""
    worker = int(kill_after("forked", ["-c", LOCKING + forking, str(tmp_path)]).split()[1])
    os.kill(worker, 0)
    try:
        assert not is_written(tmp_path)
        WriterLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_process_lets_go_of_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    """Neither of its parent's lock nor of a file that has the descriptor's number now."""
    forking = """
if not os.fork():
    assert is_written(folder)
    numbers = [os.open(sys.executable, os.O_RDONLY) for _ in range(100)]
    lock.release()
    assert [os.fstat(number) for number in numbers]
    os._exit(0 if is_written(folder) else 1)
assert os.wait()[1] == 0
lock.release()
assert not is_written(folder)
"""
    kill_after(None, ["-c", LOCKING + forking, str(tmp_path)])


def test_a_writer_waits_for_who_only_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WriterLock(tmp_path).release()
    looking = os.open(tmp_path / LOCK_FILE, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("esper.telemetry.run_folder.time.sleep", lambda _: os.close(looking))
    WriterLock(tmp_path).release()


def test_two_that_look_whether_a_run_is_written_do_not_take_each_other_for_its_writer(
    tmp_path: Path,
) -> None:
    open_store(tmp_path).close()
    with (tmp_path / ".lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not RunReader(tmp_path).is_written


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"[" * 100_000, b'{"task": "\\ud800"}', b"\xff"], ids=range(5)
)
def test_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    open_store(tmp_path).close()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"config\.json (cannot be read|does not hold)"):
        RunReader(tmp_path).config()


def test_database_that_is_locked_is_not_called_damaged(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    locking = sqlite3.connect(tmp_path / DATABASE_FILE)
    locking.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunFolderError, match="cannot be read now: database is locked"):
        RunReader(tmp_path)
    locking.close()


def test_pages_that_are_damaged_are_named_wherever_they_are_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for _ in range(500):
        store.publish(PRUNED)
    store.close()
    file = tmp_path / DATABASE_FILE
    content = bytearray(file.read_bytes())
    content[8 * 4096 : -4096] = b"\xff" * (len(content) - 9 * 4096)
    reader = RunReader(tmp_path)
    file.write_bytes(content)
    with pytest.raises(RunFolderError, match="is damaged"):
        reader.events()


@pytest.mark.parametrize(
    ("status", "way_on"),
    [("running", "go on with it .* ReopenedRunStore"), ("finished", "choose another folder")],
)
def test_folder_that_holds_a_run_is_refused_and_left_alone(
    status: RunStatus, way_on: str, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    store.set_status(status)
    store.close()
    (tmp_path / ".lock").unlink()  # as of a folder that was copied
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match=f"holds a run already, there is .*; {way_on}"):
        RunStore(tmp_path, config={"other": 1}, environment={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fails", ["environment", "opening", "filling"])
def test_a_run_that_could_not_begin_leaves_its_folder_free(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        assert (tmp_path / "config.json").exists()
        raise OSError("no space left")

    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    environment = {"device": object()} if fails == "environment" else {}
    with monkeypatch.context() as broken:
        if fails == "opening":
            broken.setattr(run_store, "CommandLog", full)
        elif fails == "filling":
            broken.setattr(RunStore, "_set", full)
        with pytest.raises((OSError, TypeError)):
            RunStore(tmp_path, config={}, environment=environment)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "notes.txt"]
    RunStore(tmp_path, config={}, environment={}).close()


def test_folder_in_which_another_process_begins_a_run_is_refused_and_left_alone(
    tmp_path: Path,
) -> None:
    lock = WriterLock(tmp_path)
    with pytest.raises(RunFolderError, match="being written by another process"):
        open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    lock.release()
    open_store(tmp_path).close()


def test_folder_in_which_another_process_was_quicker_keeps_that_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_the_other(folder: Path, **_: float) -> WriterLock:
        monkeypatch.setattr(run_store, "WriterLock", WriterLock)
        open_store(folder).close()
        return WriterLock(folder)

    monkeypatch.setattr(run_store, "WriterLock", after_the_other)
    with pytest.raises(RunFolderError, match="holds a run already"):
        RunStore(tmp_path, config={"other": 1}, environment={})
    reader = RunReader(tmp_path)
    assert (reader.config(), reader.is_written) == ({"task": "digits"}, False)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no run folder"):
        RunReader(tmp_path)


def test_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE_FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(RunFolderError, match="is damaged"):
        RunReader(tmp_path)


def test_other_store_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    database = sqlite3.connect(tmp_path / DATABASE_FILE)
    database.execute("UPDATE run SET value = '99' WHERE key = 'store_version'")
    database.commit()
    database.close()
    with pytest.raises(RunFolderError, match=r"version 99.*version 1"):
        RunReader(tmp_path)


@pytest.mark.parametrize("status", get_args(RunStatus))
def test_every_status_is_known_to_what_shows_runs(status: str) -> None:
    """A word that only the store knows would be shown grey, and counted nowhere."""
    pages = ROOT / "src" / "esper" / "dashboard" / "static"
    assert f'"{status}"' in (pages / "overview.js").read_text(encoding="utf-8")
    assert f'[data-status="{status}"]' in (pages / "dashboard.css").read_text(encoding="utf-8")
    assert status in run_page.STATUS_KINDS
