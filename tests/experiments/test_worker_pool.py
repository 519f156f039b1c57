"""Runs made by processes: what is finished is kept, whatever becomes of the others."""

from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import pytest

from esper.experiments import worker_pool
from esper.experiments.worker_pool import WorkerDiedError, make_missing


class Runs:
    """Seven runs, two at a time, in a pool that does what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.futures: list[Future[int]] = []
        self.kept: list[int] = []
        monkeypatch.setattr(worker_pool, "worker_pool", self.no_pool)

    @contextmanager
    def no_pool(self, _: int) -> Iterator[None]:
        yield None

    def submit(self, _: object, number: int) -> Future[int]:
        self.futures.append(Future())
        self.handed(number)
        return self.futures[-1]

    def handed(self, number: int) -> None:
        """End what has been handed over, as a run."""
        self.futures[number].set_result(10 * number)

    def make(self) -> None:
        make_missing(
            lambda: [number for number in range(7) if number not in self.kept],
            self.submit,
            keep=self.keep,
            describe=lambda number: f"number {number}",
            processes=2,
        )

    def keep(self, number: int, run: int) -> None:
        assert run == 10 * number
        self.kept.append(number)


def test_every_run_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch)
    runs.make()
    assert sorted(runs.kept) == list(range(7))
    assert len(runs.futures) == 7


def test_a_process_killed_between_two_runs_is_told_and_what_is_finished_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool is broken when the next run is handed to it, before any of its runs says so."""

    class Broken(Runs):
        def handed(self, number: int) -> None:
            if number == 0:
                super().handed(0)
            elif number == 2:
                super().handed(1)
                raise BrokenProcessPool("a child process terminated abruptly")

    runs = Broken(monkeypatch)
    with pytest.raises(WorkerDiedError, match="the run of number 2 was under way"):
        runs.make()
    assert runs.kept == [0, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_what_a_run_raises_is_told_after_what_is_finished_is_kept(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Runs):
        def handed(self, number: int) -> None:
            if number == 1:
                self.futures[first].set_exception(OSError("no space left"))
                self.futures[1 - first].set_result(10 * (1 - first))

    runs = Failing(monkeypatch)
    with pytest.raises(OSError, match="no space left") as caught:
        runs.make()
    assert runs.kept == [1 - first]
    assert caught.value.__notes__ == [f"in the run of number {first}"]
