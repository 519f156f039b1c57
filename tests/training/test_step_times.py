"""Steps with a seed are compared with those before it was there, and with no others."""

from esper.training.step_times import StepTimes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_steps(times: StepTimes, clock: Clock, seconds: float, count: int = 12) -> None:
    for _ in range(count):
        clock.now += seconds
        times.step()


def test_a_step_with_a_seed_is_compared_with_one_before_it() -> None:
    clock = Clock()
    times = StepTimes(clock)
    make_steps(times, clock, 2.0)
    assert times.ratio_with_seed("a") is None, "no seed has come"
    times.seed_comes("a")
    make_steps(times, clock, 3.0, count=5)
    assert times.median_seconds is None, "too few of the new network, and the old ones are no more"
    assert times.ratio_with_seed("a") is None
    make_steps(times, clock, 3.0)
    times.pause()
    clock.now += 1000.0
    make_steps(times, clock, 3.0)
    assert times.ratio_with_seed("a") == 1.5
    resumed = StepTimes(clock)
    resumed.load_state_dict(times.state_dict())
    make_steps(resumed, clock, 5.0)
    assert resumed.ratio_with_seed("a") == 2.5
