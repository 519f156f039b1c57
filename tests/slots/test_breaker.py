"""The circuit breaker as a state machine with an injected clock."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from esper.lifecycle.events import BreakerChanged, Priority
from esper.slots.breaker import BreakerState, CircuitBreaker


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def changes(events: list[object]) -> list[tuple[str, str, int]]:
    assert all(isinstance(event, BreakerChanged) for event in events)
    return [
        (event.from_state, event.to_state, event.failures)
        for event in events
        if isinstance(event, BreakerChanged)
    ]


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker("build norm", max_failures=2, cooldown_seconds=10.0, clock=clock)
    assert breaker.failed() == []
    assert changes([*breaker.failed()]) == [("closed", "open", 2)]
    return breaker


def test_a_breaker_is_closed_until_so_many_failures_in_a_row():
    breaker = CircuitBreaker("b", max_failures=3, clock=Clock())
    for _ in range(5):
        assert breaker.failed() == []
        assert breaker.failed() == []
        assert breaker.succeeded() == []
        assert breaker.allows
    breaker.failed()
    breaker.failed()
    (event,) = breaker.failed()
    assert event == BreakerChanged(breaker="b", from_state="closed", to_state="open", failures=3)
    assert event.priority is Priority.WARNING
    assert (breaker.state, breaker.allows) == (BreakerState.OPEN, False)


def test_an_open_breaker_lets_work_through_exactly_when_the_cooldown_has_passed():
    clock = Clock(100.0)
    breaker = opened(clock)
    clock.now = 109.999
    assert (breaker.state, breaker.allows) == (BreakerState.OPEN, False)
    clock.now = 110.0
    assert (breaker.state, breaker.allows) == (BreakerState.HALF_OPEN, True)


def test_a_success_while_half_open_closes_it_and_forgets_the_failures():
    clock = Clock()
    breaker = opened(clock)
    clock.now = 10.0
    assert changes([*breaker.succeeded()]) == [("open", "half_open", 2), ("half_open", "closed", 0)]
    assert breaker.state is BreakerState.CLOSED
    assert breaker.failed() == []
    assert breaker.allows


def test_one_failure_while_half_open_opens_it_for_a_whole_cooldown():
    clock = Clock()
    breaker = opened(clock)
    clock.now = 25.0
    assert changes([*breaker.failed()]) == [("open", "half_open", 2), ("half_open", "open", 3)]
    clock.now = 34.9
    assert not breaker.allows
    clock.now = 35.0
    assert breaker.allows


STEPS = st.lists(
    st.just("fail") | st.just("succeed") | st.floats(0.0, 12.0, allow_nan=False), max_size=40
)


@given(steps=STEPS, max_failures=st.integers(1, 4))
def test_events_tell_every_change_and_the_state_is_that_of_a_plain_model(
    steps: list[str | float], max_failures: int
):
    clock = Clock()
    breaker = CircuitBreaker("b", max_failures=max_failures, cooldown_seconds=10.0, clock=clock)
    failures, opened_at, told = 0, None, ["closed"]
    for step in steps:
        if isinstance(step, float):
            clock.now += step
            expected = []
        elif step == "succeed":
            half_open = opened_at is not None and clock.now - opened_at >= 10.0
            expected = ["half_open"] if half_open else []
            expected += ["closed"] if opened_at is not None else []
            failures, opened_at = 0, None
        else:
            failures += 1
            half_open = opened_at is not None and clock.now - opened_at >= 10.0
            expected = ["half_open"] if half_open else []
            if half_open or failures >= max_failures:
                expected += ["open"] if opened_at is None or half_open else []
                opened_at = clock.now
        if step == "succeed":
            events = breaker.succeeded()
        else:
            events = breaker.failed() if step == "fail" else []
        assert [after for _, after, _ in changes([*events])] == expected
        for before, after, _ in changes([*events]):
            assert before == told[-1]
            told.append(after)
        waited = None if opened_at is None else clock.now - opened_at
        assert breaker.allows == (waited is None or waited >= 10.0)
    assert all(before != after for before, after in itertools.pairwise(told))
