"""Making the missing runs, several processes at a time."""

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from esper.experiments.comparison.config import CompareConfig
from esper.experiments.comparison.folder import ComparisonFolder
from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.runs import RunRequest, RunResult, execute
from esper.experiments.worker_pool import WorkerDiedError, worker_pool


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """How far a comparison is.

    Attributes:
        finished: Runs.
        expected: Runs in all, as far as can be told by now.
        running: What is being made.
        seconds_left: Estimate; None before the first run has ended.
    """

    finished: int
    expected: int
    running: tuple[RunRequest, ...]
    seconds_left: float | None


def run_missing(
    config: CompareConfig,
    folder: ComparisonFolder,
    *,
    processes: int,
    on_change: Callable[[Outlook, RunResult | None], None],
    clock: Callable[[], float] = time.monotonic,
) -> Comparison:
    """Make every run that is missing, and keep each as soon as it ends.

    Args:
        config: Of the comparison.
        folder: Where finished runs are, and go.
        processes: How many runs are made at a time; each has the task's number of threads.
        on_change: Called after every start, and with every finished run.
        clock: Monotonic seconds.

    Raises:
        WorkerDiedError: A process was killed, for want of memory perhaps.
        Exception: Whatever a run raised; its request is in a note.

    Effects: starts processes, and ends them however this ends.
    """
    comparison = Comparison(config, folder.results())
    running: dict[Future[RunResult], RunRequest] = {}
    seconds: dict[str, list[float]] = {}
    begun: dict[Future[RunResult], float] = {}

    def outlook() -> Outlook:
        return _outlook(comparison, tuple(running.values()), seconds, processes)

    def keep(ended: Iterable[Future[RunResult]]) -> None:
        nonlocal comparison
        for future in sorted(ended, key=_failed):  # what is finished is kept first
            request = running.pop(future)
            result = _result_of(future, request)
            folder.add(result)
            seconds.setdefault(request.arm, []).append(clock() - begun.pop(future))
            comparison = Comparison(config, [*comparison.results.values(), result])
            on_change(outlook(), result)

    with worker_pool(processes) as pool:
        while True:
            under_way = {request.key for request in running.values()}
            waiting = [r for r in comparison.missing() if r.key not in under_way]
            for request in waiting[: processes - len(running)]:
                try:
                    future = pool.submit(execute, request, config.run)
                except BrokenProcessPool as error:  # those under way end now, if none has told yet
                    keep(wait(running).done)
                    raise _worker_died(request) from error
                running[future], begun[future] = request, clock()
                on_change(outlook(), None)
            if not running:
                return comparison
            keep(wait(running, return_when=FIRST_COMPLETED).done)


def _outlook(
    comparison: Comparison,
    running: tuple[RunRequest, ...],
    seconds: dict[str, list[float]],
    processes: int,
) -> Outlook:
    ahead = comparison.ahead()
    finished = len(comparison.results)
    known = {arm: statistics.fmean(values) for arm, values in seconds.items()}
    left = None
    if known:
        usual = statistics.fmean(known.values())
        left = sum(known.get(arm, usual) for arm in ahead) / processes
    return Outlook(
        finished=finished, expected=finished + len(ahead), running=running, seconds_left=left
    )


def _worker_died(request: RunRequest) -> WorkerDiedError:
    return WorkerDiedError(
        f"a process was killed, perhaps for want of memory; {request.arm} of random seed "
        f"{request.random_seed} was under way. Start again with the same folder, and with "
        "fewer processes, to go on"
    )


def _failed(future: Future[RunResult]) -> bool:
    return future.exception() is not None


def _result_of(future: Future[RunResult], request: RunRequest) -> RunResult:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _worker_died(request) from error
    except Exception as error:
        error.add_note(
            f"in the run of arm {request.arm!r}, random seed {request.random_seed}, learning rate "
            f"{request.learning_rate:g}, {request.epochs} epochs"
        )
        raise
