"""What has come is known, each once, and what is missing is counted, in little memory."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.bus.sequences import SequenceTracker

arrivals = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 25), st.sampled_from([1, 1, 1, 2, 5])),
    max_size=120,
)
"""Producer, first number, and how many come together."""


def missing_of(seen: dict[str, set[int]]) -> int:
    return sum(max(numbers, default=0) - len(numbers) for numbers in seen.values())


@given(arrivals, st.integers(0, 120))
def test_it_knows_what_a_set_knows_also_when_it_is_stored_in_between(
    sequences: list[tuple[str, int, int]], stored_after: int
) -> None:
    tracker = SequenceTracker()
    seen: dict[str, set[int]] = {"a": set(), "b": set()}
    for index, (producer, first, count) in enumerate(sequences):
        if index == stored_after:
            tracker = SequenceTracker.load(json.loads(json.dumps(tracker.state_dict())))
        numbers = range(first, first + count)
        new = seen[producer].isdisjoint(numbers)
        assert tracker.take(producer, numbers) is new
        seen[producer].update(numbers if new else ())
        assert tracker.missing == missing_of(seen)


def test_what_comes_in_any_order_leaves_nothing_missing_and_one_interval() -> None:
    numbers = [*range(1, 3001)]
    random.Random(0).shuffle(numbers)
    tracker = SequenceTracker(max_gaps=3000)
    assert all(tracker.take("a", range(number, number + 1)) for number in numbers)
    assert not any(tracker.take("a", range(number, number + 1)) for number in numbers)
    assert tracker.missing == 0
    assert tracker.state_dict() == {"a": {"first": [0], "last": [3000], "missing": 0}}


def test_a_million_missing_are_one_gap() -> None:
    tracker = SequenceTracker()
    tracker.take("a", range(1, 2))
    tracker.take("a", range(1_000_002, 1_000_003))
    assert tracker.missing == 1_000_000
    assert len(json.dumps(tracker.state_dict())) < 100


@given(arrivals, st.integers(1, 4))
def test_with_more_gaps_than_are_kept_nothing_is_taken_twice_and_the_count_never_falls_short(
    sequences: list[tuple[str, int, int]], max_gaps: int
) -> None:
    tracker = SequenceTracker(max_gaps=max_gaps)
    taken: dict[str, set[int]] = {"a": set(), "b": set()}
    for producer, first, count in sequences:
        numbers = range(first, first + count)
        if tracker.take(producer, numbers):
            assert taken[producer].isdisjoint(numbers)
            taken[producer].update(numbers)
        assert tracker.missing == missing_of(taken)
        state = tracker.state_dict()
        assert all(len(known["first"]) <= max_gaps + 1 for known in state.values())
    assert SequenceTracker.load(tracker.state_dict(), max_gaps=max_gaps).missing == tracker.missing


@pytest.mark.parametrize("numbers", [range(1), range(-1, 3), range(3, 3), range(1, 9, 2)], ids=str)
def test_numbers_that_no_sealer_gives_are_refused(numbers: range) -> None:
    with pytest.raises(ValueError, match="count from 1, got range"):
        SequenceTracker().take("a", numbers)
