"""Waits double, are bounded, begin anew after health, and end after too many in a row."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.supervision.config import RestartConfig
from esper.supervision.restart_policy import RestartPolicy


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_waits_double_from_one_second_to_a_minute() -> None:
    policy = RestartPolicy(RestartConfig(max_restarts=9), clock=Clock())
    waits = [policy.died() for _ in range(10)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, None]


@pytest.mark.parametrize(("healthy", "then"), [(599.0, 4.0), (600.0, 1.0)])
def test_ten_healthy_minutes_make_the_next_death_the_first(healthy: float, then: float) -> None:
    clock = Clock()
    policy = RestartPolicy(RestartConfig(), clock=clock)
    assert [policy.died(), policy.died()] == [1.0, 2.0]
    clock.seconds += 3600.0  # a slow start is no health
    policy.became_ready()
    clock.seconds += healthy
    assert policy.died() == then


def test_one_that_never_becomes_ready_is_given_up_however_long_it_takes() -> None:
    clock = Clock()
    policy = RestartPolicy(RestartConfig(max_restarts=2), clock=clock)
    waits = []
    for _ in range(3):
        clock.seconds += 10_000.0
        waits.append(policy.died())
    assert waits == [1.0, 2.0, None]


@given(
    first=st.floats(0.001, 100.0),
    factor=st.floats(1.0, 1e6),
    limit=st.integers(0, 2000),
    lives=st.lists(st.none() | st.floats(0.0, 2000.0), max_size=60),
)
def test_every_history_has_bounded_waits_and_gives_up_exactly_after_the_limit(
    first: float, factor: float, limit: int, lives: list[float | None]
) -> None:
    """Lives are seconds in health, None without any; each ends with a death."""
    clock = Clock()
    config = RestartConfig(first_seconds=first, longest_seconds=first * factor, max_restarts=limit)
    policy = RestartPolicy(config, clock=clock)
    in_row = 0
    for life in lives:
        if life is not None:
            policy.became_ready()
            clock.seconds += life
            in_row = 0 if life >= config.healthy_seconds else in_row
        wait = policy.died()
        in_row += 1
        if in_row > limit:
            assert wait is None
            return
        assert wait is not None
        assert wait == pytest.approx(
            next(itertools.islice(_doubled(first, config.longest_seconds), in_row - 1, None))
        )


def _doubled(first: float, longest: float) -> "itertools.accumulate[float]":
    return itertools.accumulate(itertools.repeat(first), lambda wait, _: min(2.0 * wait, longest))
