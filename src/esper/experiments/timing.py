"""Steps timed in turn, so that whatever else the machine does meets all of them alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of two times, over blocks: the median, and the middle half."""

    median: float
    low: float
    high: float


def timed_in_turn(
    steps: Sequence[Callable[[], object]], rounds: int, *, first_round: int = 0
) -> list[list[float]]:
    """Call each step once a round, in every position, and before every other, equally often.

    Args:
        steps: Each returns when all that it does is done; on a GPU it waits for the device.
        rounds: Calls of each.
        first_round: How many were made before; the order goes on from there.

    Returns:
        The seconds of each call, by step.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for order in itertools.islice(_orders(len(steps)), first_round, first_round + rounds):
        for which in order:
            started = time.perf_counter()
            steps[which]()
            seconds[which].append(time.perf_counter() - started)
    return seconds


def _orders(count: int) -> Iterator[Sequence[int]]:
    """Yield rotations, each forward and backward, again and again."""
    for start in itertools.cycle(range(count)):
        rotated = [*range(start, count), *range(start)]
        yield rotated
        yield rotated[::-1]


def ratio_over_blocks(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Ratio:
    """Return by how much times exceed others: the ratio of medians within each of many blocks.

    A machine that becomes slower on the way does not change it.

    Args:
        ours: Seconds, by block; two blocks or more.
        theirs: The same, measured at the same time.
    """
    ratios = [
        statistics.median(block) / statistics.median(other)
        for block, other in zip(ours, theirs, strict=True)
    ]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median=median, low=low, high=high)
