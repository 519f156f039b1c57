"""What watching many runs costs, and what is kept of those that were looked at."""

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from esper.bus.messages import RunMessage
from esper.bus.mirror import Mirror
from esper.dashboard import run_tail, watched_run, watcher
from esper.dashboard.comparison import compare
from esper.dashboard.follower import Follower
from esper.dashboard.run_tail import RunTail
from esper.dashboard.stream import Streams
from esper.dashboard.trend import Trend
from esper.dashboard.watched_run import WatchedRun
from esper.dashboard.watcher import UnknownRunError, Watcher
from esper.lifecycle import SeedStage
from esper.lifecycle.events import RunWentBack
from esper.telemetry import RunStore
from esper.telemetry.run_reader import RunReader
from esper.telemetry.run_store import ReopenedRunStore
from served_runs import CONFIG, publish, skip, write_life, write_run


def settled(folder: Path) -> WatchedRun:
    """Return a run that was read, and once more, and once more as reading makes a WAL file."""
    run = WatchedRun("run", folder)
    assert run.look()
    assert not any(run.look() for _ in range(3))
    return run


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Path) -> RunReader:
        raise AssertionError("the database was opened")

    monkeypatch.setattr(watched_run, "RunReader", read)


def test_run_in_which_nothing_happens_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    run = settled(tmp_path)
    forbid_reading(monkeypatch)
    assert not run.look()
    monkeypatch.undo()
    store = ReopenedRunStore(tmp_path, after_step=1000)
    skip(store, 11, "bad")
    store.close()
    assert run.look()
    assert run.row.attempt == 2


def test_run_elsewhere_stands_as_it_has_told_whether_or_not_a_router_has_its_mirror_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(tmp_path / "run", RunMessage(config=CONFIG, environment={}, after_step=-1))
    run = settled(tmp_path / "run")
    mirror.close()
    for _ in range(3):
        run.look()
        assert (run.row.status, run.row.resume) == ("running", "")
    forbid_reading(monkeypatch)
    assert not run.look()


def test_run_that_cannot_be_read_is_looked_at_again(tmp_path: Path) -> None:
    write_run(tmp_path)
    config = (tmp_path / "config.json").rename(tmp_path / "later.json")
    run = WatchedRun("run", tmp_path)
    assert run.look()
    assert not any(run.look() for _ in range(10))
    assert run.row.status == "unreadable"
    assert "config.json" in (run.row.problem or "")
    config.rename(tmp_path / "config.json")
    assert any(run.look() for _ in range(10))
    assert (run.row.status, run.row.problem, run.row.task) == ("finished", None, "digits")


@pytest.mark.parametrize(
    "error", [PermissionError("not yours"), OSError(errno.EMFILE, "too many"), RecursionError()]
)
def test_run_that_cannot_be_read_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(folder: Path) -> bool:
        if folder.name == "bad":
            raise error
        return False

    for name in ("bad", "good", "other"):
        write_run(tmp_path / name)
    watching = Watcher(tmp_path)
    monkeypatch.setattr(watched_run, "is_written", fail)
    watching.look()
    rows = {row.id: row for row in watching.changes().rows}
    assert rows["good"].status == rows["other"].status == "finished"
    assert rows["bad"].status == "unreadable"
    assert str(error) in (rows["bad"].problem or "")


def test_runs_are_not_gone_while_this_process_has_too_many_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    write_run(tmp_path / "run")
    watching = Watcher(tmp_path)
    watching.look()
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        for _ in range(6):
            watching.look()
        assert [row.id for row in watching.changes().rows] == ["run"]
    write_run(tmp_path / "next")
    assert any(watching.look() for _ in range(6))


def test_resumed_run_begins_its_curve_anew(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = WatchedRun("run", tmp_path)
    run.look()
    assert run.row.best_loss == 0.2
    store = ReopenedRunStore(tmp_path, after_step=30)
    run.look()
    assert run.row.trend == [2.0, 1.0, 0.6667]
    assert run.row.best_loss == run.row.loss == pytest.approx(2.0 / 3)
    store.close()


def test_slot_stands_where_it_did_at_the_step_that_a_run_goes_back_to(tmp_path: Path) -> None:
    write_run(tmp_path, finished=False)  # a seed is committed at step 40, another pruned at 50
    store = ReopenedRunStore(tmp_path, after_step=100)
    publish(store, 10, RunWentBack(from_step=100, to_step=10, same_batches=True))
    write_life(store, slot="stage1", epoch=2, until="committed")
    write_life(store, slot="stage2", epoch=3)
    store.close()
    tail = RunTail(tmp_path)
    while tail.advance():
        pass
    run = WatchedRun("run", tmp_path)
    run.look()
    figures = tail.state().figures
    for told in (figures, run.row):  # the pruned one lives again
        assert (told.growing, told.committed, told.pruned) == (1, 1, 0)
    assert compare([(run.row, tmp_path)]).runs[0].params == 1000 + 300
    stages = {slot.path: slot.stage for slot in tail.state().slots}
    assert stages == {"stage1": SeedStage.FOSSILIZED, "stage2": SeedStage.BLENDING}


def test_run_removed_and_made_anew_under_its_name_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, task="first")
    watching = Watcher(tmp_path)
    watching.look()
    tail = watching.tail("run")
    tail.advance()
    before = tail.state()
    shutil.rmtree(folder)
    store = RunStore(folder, config={**CONFIG, "task": "second"}, environment={})
    skip(store, 5, "bad")
    store.measure(5, 50, {"loss": 3.0})
    store.close()
    watching.look()
    (row,) = watching.changes().rows
    assert (row.task, row.loss, row.best_loss, row.trend) == ("second", 3.0, 3.0, [3.0])
    assert watching.tail("run") is tail
    tail.advance()
    after = tail.state()
    assert [line.words for line in after.lines] == ["step 50 skipped: bad"]
    assert after.figures.metrics == {"loss": 3.0}
    assert after.config["task"] == "second"
    assert before.telling != after.telling
    assert before.version != after.version


def test_run_is_read_once_more_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit right behind one that was read may leave the files' times and sizes as they are."""
    write_run(tmp_path, finished=False)
    run = WatchedRun("run", tmp_path)
    monkeypatch.setattr(watched_run, "_marks", lambda _: ((1, 1, 1),))
    assert run.look()
    events = run.row.events
    store = ReopenedRunStore(tmp_path, after_step=1000)
    skip(store, 11, "in the same tick")
    store.set_status("finished")
    store.close()
    assert run.look()
    assert run.row.events == events + 1


def test_stories_that_were_looked_at_long_ago_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        write_run(tmp_path / name)
    watching = Watcher(tmp_path)
    one = watching.tail("one")
    one.advance()
    assert one.num_rows > 30
    monkeypatch.setattr(watcher, "MAX_KEPT_ROWS", 2 * one.num_rows)
    two = watching.tail("two")
    two.advance()
    assert watching.tail("one") is one
    watching.tail("three").advance()
    watching.tail("three")
    assert watching.tail("one") is one
    assert watching.tail("two") is two, "it is forgotten, but somebody still has it"
    for name in ("three", "one", "three"):
        watching.tail(name).advance()
    del two
    assert watching.tail("two").num_rows == 0


def test_long_run_is_read_in_parts_values_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    reader = RunReader(tmp_path / "run")
    names = [value.name for value in reader.metrics()]
    assert len(names) > 5
    monkeypatch.setattr(run_tail, "CHUNK_VALUES", 5)
    tail = RunTail(tmp_path / "run")
    parts = 1
    while tail.advance():
        parts += 1
    assert parts == len(names) // 5 + 1
    assert tail.num_rows == len(names) + sum(reader.glance().event_counts.values())


def test_open_page_keeps_its_run_in_mind_however_long_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {name: RunStore(tmp_path / name, config=CONFIG, environment={}) for name in "ab"}
    monkeypatch.setattr(watcher, "MAX_KEPT_ROWS", 0)
    begun: list[str] = []
    begin = RunTail._begin

    def noted(tail: RunTail, life: tuple[str, int, float | None]) -> None:
        begun.append(tail._reader.folder.name)
        begin(tail, life)

    monkeypatch.setattr(RunTail, "_begin", noted)

    async def watch() -> None:
        watching = Watcher(tmp_path)
        follower = Follower(watching)
        streams = Streams(watching, follower, None)
        pages = {name: streams.messages(run=name, last_id="") for name in stores}
        for epoch in range(3):
            for name, page in pages.items():
                skip(stores[name], epoch, "bad")
                await follower.look()
                while "bad" not in (message := (await anext(page)).decode()):
                    pass
                assert f'"run":"{name}"' in message

    asyncio.run(watch())
    for store in stores.values():
        store.close()
    assert sorted(begun) == ["a", "b"]


def test_run_that_is_not_there_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownRunError):
        Watcher(tmp_path).tail("none")


def test_nobody_looks_while_nobody_listens(tmp_path: Path) -> None:
    class Counting(Watcher):
        looks = 0

        def look(self) -> bool:
            self.looks += 1
            return super().look()

    async def follow() -> tuple[int, int]:
        watching = Counting(tmp_path)
        follower = Follower(watching)
        task = asyncio.create_task(follower.run())
        for _ in range(20):
            await asyncio.sleep(0)
        alone = watching.looks
        write_run(tmp_path / "run")
        with follower.listen() as listener:
            assert await listener.wait(10.0)
        task.cancel()
        return alone, watching.looks

    alone, listened = asyncio.run(follow())
    assert alone == 0
    assert listened >= 1


def test_look_that_fails_is_not_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Watcher):
        looks = 0

        def look(self) -> bool:
            self.looks += 1
            if self.looks <= 2:
                raise ZeroDivisionError
            return super().look()

    async def follow() -> bool:
        write_run(tmp_path / "run")
        follower = Follower(Failing(tmp_path))
        task = asyncio.create_task(follower.run())
        with follower.listen() as listener:
            heard = await listener.wait(10.0)
        task.cancel()
        return heard

    assert asyncio.run(follow())
    assert [record.message for record in caplog.records] == ["looking at the runs failed"]


def test_trend_is_short_and_ends_with_the_last_value() -> None:
    trend = Trend(max_points=8)
    for value in range(1, 1001):
        trend.take(float(value))
        trend.take(float("nan"))
    points = trend.points()
    assert len(points) <= 9
    assert (points[0], points[-1]) == (1.0, 1000.0)
    assert points == sorted(points)
