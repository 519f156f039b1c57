"""A sink that fails is told once, stops nothing, and keeps nothing from the others."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from esper.lifecycle.events import EventRecord, SeedGerminated, SinkFailed, SinkLossesCounted
from esper.telemetry import RunReader, RunStore, Sink, TensorBoardSink
from growth_problem import Problem, Recorder
from tracked_run import STARTED, growing


@dataclass
class Raising:
    """A sink that raises, always or while it is told to."""

    error: BaseException = field(default_factory=lambda: RuntimeError("no room"))
    broken: bool = True
    taken: int = 0
    calls: int = 0

    def _take(self) -> None:
        self.calls += 1
        if self.broken:
            raise self.error
        self.taken += 1

    def publish(self, record: EventRecord) -> None:
        self._take()

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        self._take()

    def flush(self) -> None:
        self._take()


def weights(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in problem.model.state_dict().items()}


def trained(sinks: list[Sink]) -> tuple[Problem, dict[str, torch.Tensor]]:
    problem, trainer = growing(sinks)
    trainer.fit()
    return problem, weights(problem)


def test_training_is_bitwise_the_same_with_sinks_that_always_fail(tmp_path: Path) -> None:
    """A raising one, and a real one: an event file that is closed."""
    closed = TensorBoardSink(tmp_path)
    closed.close()
    plain, expected = trained([])
    problem, result = trained([Raising(), closed])
    assert list(result) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in result.items())
    assert plain.recorder.of(SeedGerminated)
    told = problem.recorder.of(SinkFailed)
    assert [event.sink for event in told] == ["Raising", "TensorBoardSink"]
    assert told[0].error == "RuntimeError: no room"
    assert "closed file" in told[1].error
    others = [r.event for r in problem.recorder.records if not isinstance(r.event, SinkFailed)]
    assert [event.type for event in others] == [r.event.type for r in plain.recorder.records]


def test_sinks_before_and_behind_a_failing_one_take_everything() -> None:
    first, failing, last = Recorder(), Raising(), Recorder()
    _, trainer = growing([first, failing, last], epochs=2)
    trainer.fit()
    assert len(first.metrics) == len(last.metrics) == 4
    assert first.of(SinkFailed) == last.of(SinkFailed)
    assert [record.event for record in first.records] == [record.event for record in last.records]
    assert first.records[0].event.type == "run_started"


def test_a_sink_that_recovers_takes_what_comes_then_and_losses_are_counted() -> None:
    _, trainer = growing([failing := Raising()], epochs=2)
    growth = trainer.growth
    growth.publish([STARTED.event, STARTED.event])
    growth.measure({"loss": 1.0})
    lost = failing.calls
    failing.broken = False
    growth.publish([STARTED.event])
    assert failing.taken == 1
    assert growth.sink_guard.losses == (SinkLossesCounted(sink="Raising", lost_calls=lost),)


def test_two_failing_sinks_tell_of_each_other_and_of_nothing_twice() -> None:
    _, trainer = growing([Raising(), Raising()], epochs=2)
    trainer.fit()
    recorder = trainer.growth.sinks[0]
    assert isinstance(recorder, Recorder)
    assert len(recorder.of(SinkFailed)) == 2


def test_a_failure_that_no_other_sink_takes_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, trainer = growing([], epochs=2)
    trainer.growth.sinks[:] = [Raising()]
    with caplog.at_level(logging.WARNING, logger="esper"):
        trainer.fit()
    assert [record.getMessage() for record in caplog.records] == [
        "Raising failed, training goes on: RuntimeError: no room"
    ]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_process_passes(stop: BaseException) -> None:
    _, trainer = growing([Raising(stop)], epochs=2)
    with pytest.raises(type(stop)):
        trainer.fit()


def test_a_run_folder_on_a_full_disk_is_told_and_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    """SQLite itself says that the disk is full: the database may have no more pages."""
    store = RunStore(tmp_path / "run", config={}, environment={})
    problem, trainer = growing([store], epochs=4)
    database = store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    reports = trainer.run()
    next(reports)
    next(reports)
    (told,) = problem.recorder.of(SinkFailed)
    assert told.sink == "RunStore"
    assert told.error == "OperationalError: database or disk is full"
    database.execute("PRAGMA max_page_count = 100000")
    assert len(list(reports)) == 2
    store.close()
    rows = RunReader(tmp_path / "run").metrics()
    assert {row.epoch for row in rows} >= {3, 4}
    assert len(problem.recorder.of(SinkFailed)) == 1
