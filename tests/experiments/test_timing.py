"""Steps that are timed in turn."""

import time
from collections import Counter

import pytest

from esper.experiments.timing import ratio_over_blocks, timed_in_turn


def test_each_step_comes_in_every_position_and_before_every_other_equally_often() -> None:
    calls: list[int] = []
    steps = [lambda which=which: calls.append(which) for which in range(3)]
    for first_round in range(0, 6, 2):
        seconds = timed_in_turn(steps, 2, first_round=first_round)
        assert [len(of_step) for of_step in seconds] == [2, 2, 2]
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    for position in range(3):
        assert Counter(order[position] for order in rounds) == {0: 2, 1: 2, 2: 2}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert sum(order.index(first) < order.index(second) for order in rounds) == 3


def test_seconds_are_those_of_the_step_itself() -> None:
    quick, slow = timed_in_turn([lambda: None, lambda: time.sleep(0.01)], 2)
    assert max(quick) < 0.01 <= min(slow)


def test_a_machine_that_becomes_slower_does_not_change_the_ratio() -> None:
    speeds = [1.0, 2.0, 4.0, 8.0]
    theirs = [[speed, speed, 100.0 * speed] for speed in speeds]
    ours = [[1.5 * second for second in block] for block in theirs]
    ratio = ratio_over_blocks(ours, theirs)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    ours[0] = [3.0 * second for second in theirs[0]]
    ratio = ratio_over_blocks(ours, theirs)
    assert ratio.median == 1.5
    assert ratio.high > 1.5
