"""Caches bounded in count and in time, with an injected clock."""

import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.slots.caches import BoundedCache


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Value:
    """Something a weak reference can point to."""


def cache_of(clock: Clock, *, entries: int = 3, age: float = 10.0) -> BoundedCache[object]:
    return BoundedCache(max_entries=entries, max_age_seconds=age, clock=clock)


def test_a_value_is_made_once_while_it_is_young_and_again_when_it_is_old():
    clock, made = Clock(), []
    cache = cache_of(clock)

    def make() -> object:
        made.append(clock.now)
        return None  # a value like any other

    for clock.now in (0.0, 5.0, 9.9, 10.0, 19.9):
        assert cache.get_or_make("key", make) is None
    assert made == [0.0, 10.0]
    assert (cache.hits, cache.misses) == (3, 2)


def test_the_least_recently_used_entry_makes_room():
    cache = cache_of(Clock(), entries=2)
    for key in ("a", "b", "a", "c"):
        cache.get_or_make(key, Value)
    assert len(cache) == 2
    before = cache.misses
    cache.get_or_make("a", Value)
    assert cache.misses == before
    cache.get_or_make("b", Value)
    assert cache.misses == before + 1


@pytest.mark.parametrize("drop", ["sweep", "clear"])
def test_what_is_dropped_is_no_longer_held_in_memory(drop: str):
    clock = Clock()
    cache = cache_of(clock)
    held = weakref.ref(cache.get_or_make("old", Value))
    clock.now = 6.0
    young = weakref.ref(cache.get_or_make("young", Value))
    cache.sweep()
    assert held() is not None
    clock.now = 10.0
    getattr(cache, drop)()
    assert held() is None
    assert (young() is None) == (drop == "clear")
    assert len(cache) == (0 if drop == "clear" else 1)


def test_a_failure_to_make_is_not_remembered():
    cache = cache_of(Clock())

    def fail() -> object:
        raise RuntimeError("could not make it")

    with pytest.raises(RuntimeError, match="could not make it"):
        cache.get_or_make("key", fail)
    assert len(cache) == 0
    assert cache.get_or_make("key", lambda: 3) == 3


@given(
    steps=st.lists(st.tuples(st.integers(0, 6), st.floats(0.0, 6.0)), max_size=40),
    entries=st.integers(1, 4),
)
def test_it_never_holds_more_or_longer_than_allowed(steps: list[tuple[int, float]], entries: int):
    clock = Clock()
    cache = cache_of(clock, entries=entries)
    for key, seconds in steps:
        clock.now += seconds
        made_at, made_for = cache.get_or_make(key, lambda key=key: (clock.now, key))
        assert made_for == key
        assert clock.now - made_at <= 10.0
        assert len(cache) <= entries
    assert cache.hits + cache.misses == len(steps)
