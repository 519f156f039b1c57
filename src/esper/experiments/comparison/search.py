"""Choosing a learning rate: every arm tries equally many, where it pays to look."""

import math
from collections.abc import Mapping

_FACTOR = 2.0


def next_rate(scores: Mapping[float, float], first: float, budget: int) -> float | None:
    """Return the learning rate to try next; None when the budget is spent.

    The first three are `first`, half and twice that. Further ones go beyond the edge that the best
    one stands on, or between the best and the better of its neighbours.

    Args:
        scores: Loss by learning rate tried so far; infinite for a run that diverged.
        first: Where the search begins.
        budget: How many may be tried.
    """
    if len(scores) >= budget:
        return None
    for rate in (first, first / _FACTOR, first * _FACTOR):
        if rate not in scores:
            return rate
    rates = sorted(scores)
    place = rates.index(best_rate(scores))
    if place == 0:
        return rates[0] / _FACTOR
    if place == len(rates) - 1:
        return rates[-1] * _FACTOR
    neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: scores[rate])
    return math.sqrt(rates[place] * neighbour)


def best_rate(scores: Mapping[float, float]) -> float:
    """Return the rate with the lowest loss, of equal ones the lowest rate."""
    return min(sorted(scores), key=lambda rate: scores[rate])


def at_edge(scores: Mapping[float, float]) -> bool:
    """Whether the best rate is the lowest or the highest tried, as a single one is."""
    return best_rate(scores) in (min(scores), max(scores))
