"""The search for a learning rate: equally many tries for every arm, where they help."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.experiments.comparison.search import at_edge, best_rate, next_rate


def search(loss: Callable[[float], float], first: float, budget: int) -> dict[float, float]:
    scores: dict[float, float] = {}
    while (rate := next_rate(scores, first, budget)) is not None:
        assert rate not in scores
        scores[rate] = loss(rate)
    return scores


@given(st.floats(-9, 3), st.integers(1, 9))
def test_every_search_spends_its_budget_and_never_twice_on_one_rate(
    best: float, budget: int
) -> None:
    scores = search(lambda rate: (math.log2(rate) - best) ** 2, first=0.01, budget=budget)
    assert len(scores) == budget


@given(st.floats(-10, -3))
def test_the_best_rate_is_found_within_half_a_doubling(best: float) -> None:
    scores = search(lambda rate: (math.log2(rate) - best) ** 2, first=2**-6.5, budget=8)
    assert abs(math.log2(best_rate(scores)) - best) <= 0.5
    assert not at_edge(scores)


def test_the_first_three_lie_around_the_configured_rate() -> None:
    assert search(lambda _: 1.0, first=0.1, budget=3).keys() == {0.1, 0.05, 0.2}


@pytest.mark.parametrize(("sign", "fourth"), [(1.0, 0.025), (-1.0, 0.4)])
def test_a_best_rate_on_the_edge_is_told_and_looked_beyond(sign: float, fourth: float) -> None:
    scores = search(lambda rate: sign * rate, first=0.1, budget=3)
    assert at_edge(scores)
    assert next_rate(scores, 0.1, 4) == pytest.approx(fourth)


def test_a_diverged_rate_is_never_the_best() -> None:
    assert best_rate({0.1: 2.0, 0.2: math.inf}) == 0.1
    assert at_edge({0.1: 2.0})


def test_a_best_rate_inside_is_refined_towards_the_better_neighbour() -> None:
    assert next_rate({0.05: 3.0, 0.1: 1.0, 0.2: 2.0}, 0.1, 4) == pytest.approx(math.sqrt(0.02))
    assert next_rate({0.05: 2.0, 0.1: 1.0, 0.2: 3.0}, 0.1, 4) == pytest.approx(math.sqrt(0.005))
