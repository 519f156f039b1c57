"""Making the missing runs, several processes at a time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from esper.experiments.comparison.config import CompareConfig
from esper.experiments.comparison.folder import ComparisonFolder
from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.runs import RunRequest, RunResult, execute
from esper.experiments.worker_pool import make_missing


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
        SeriesFolderError: Another process makes them, a file in the folder is damaged, or a
            policy's has changed.
        WorkerDiedError, Exception: As `make_missing`.

    Effects: starts processes, and ends them however this ends.
    """
    with folder.making_runs() as kept:
        comparison = Comparison(config, kept)
        running: dict[str, RunRequest] = {}
        begun: dict[str, float] = {}
        seconds: dict[str, list[float]] = {}

        def outlook() -> Outlook:
            return _outlook(comparison, tuple(running.values()), seconds, processes)

        def missing() -> list[RunRequest]:
            return comparison.missing()

        def begin(request: RunRequest) -> None:
            running[request.key], begun[request.key] = request, clock()
            on_change(outlook(), None)

        def keep(request: RunRequest, result: RunResult) -> None:
            nonlocal comparison
            del running[request.key]
            folder.add(result)
            seconds.setdefault(request.arm, []).append(clock() - begun.pop(request.key))
            comparison = Comparison(config, [*comparison.results.values(), result])
            on_change(outlook(), result)

        make_missing(
            missing,
            lambda pool, request: pool.submit(execute, request, config.run),
            keep=keep,
            describe=_describe,
            processes=processes,
            on_start=begin,
        )
    return comparison


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


def _describe(request: RunRequest) -> str:
    return (
        f"arm {request.arm!r}, random seed {request.random_seed}, learning rate "
        f"{request.learning_rate:g}, {request.epochs} epochs"
    )
