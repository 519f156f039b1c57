"""Means with intervals, and where two curves meet."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esper.experiments.comparison.intervals import (
    Crossing,
    crossing,
    loss_at,
    mean_interval,
    student_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 200])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.999])
def test_quantiles_are_those_of_scipy(degrees: int, probability: float) -> None:
    expected = stats.t.ppf(probability, degrees)
    assert student_quantile(degrees, probability) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_the_interval_is_students(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.low is not None
    assert interval.high is not None
    error = stats.sem(values)
    low, high = (
        stats.t.interval(0.95, len(values) - 1, loc=interval.mean, scale=error)
        if error > 0.0
        else (interval.mean, interval.mean)
    )
    assert interval.low == pytest.approx(low, abs=1e-9)
    assert interval.high == pytest.approx(high, abs=1e-9)


def test_one_value_has_no_interval_and_an_infinite_one_says_nothing() -> None:
    for values in ([1.0], [1.0, math.inf]):
        interval = mean_interval(values)
        assert (interval.low, interval.high) == (None, None)
        assert not interval.above_zero
        assert not interval.below_zero


def lines(noise: float = 0.0) -> dict[int, list[tuple[float, float]]]:
    """Losses that fall by 0.1 per doubling of the cost, and reach 1.0 at three quarters."""
    shifts = {0: -noise, 1: 0.0, 2: noise}
    at = {seed: 1.0 + shift for seed, shift in shifts.items()}
    return {
        seed: [(cost, at[seed] - 0.1 * math.log2(cost / 0.75)) for cost in (0.5, 0.6, 0.9, 1.0)]
        for seed in shifts
    }


TARGETS = dict.fromkeys(range(3), (1.0, 1.0))


def test_a_crossing_is_found_between_points_on_a_logarithmic_axis() -> None:
    found = crossing(lines(), TARGETS)
    assert found.ratio == pytest.approx(0.75, rel=2e-3)
    assert (found.above, found.below) == (False, False)


def test_costs_are_relative_to_the_targets_own() -> None:
    dear = {seed: [(7.0 * cost, loss) for cost, loss in curve] for seed, curve in lines().items()}
    found = crossing(dear, dict.fromkeys(range(3), (7.0, 1.0)))
    assert found.ratio == pytest.approx(0.75, rel=2e-3)


def test_the_interval_of_a_crossing_is_where_a_t_test_does_not_tell() -> None:
    noise = 0.01
    found = crossing(lines(noise), TARGETS)
    reach = stats.t.ppf(0.975, 2) * noise / math.sqrt(3)
    assert found.low == pytest.approx(0.75 * 2 ** (-reach / 0.1), rel=3e-3)
    assert found.high == pytest.approx(0.75 * 2 ** (reach / 0.1), rel=3e-3)


def test_pairs_that_differ_alike_leave_no_doubt() -> None:
    curves, targets = lines(0.3), {0: (1.0, 0.7), 1: (1.0, 1.0), 2: (1.0, 1.3)}
    found = crossing(curves, targets)
    assert found.low == pytest.approx(found.high, rel=5e-3)


def test_a_curve_on_one_side_says_how_far_it_was_measured() -> None:
    worse = crossing(lines(), dict.fromkeys(range(3), (1.0, 0.5)))
    assert (worse.above, worse.below, worse.ratio, worse.low) == (True, False, None, None)
    assert worse.last == pytest.approx(1.0)
    better = crossing(lines(), dict.fromkeys(range(3), (1.0, 2.0)))
    assert (better.above, better.below, better.ratio) == (False, True, None)
    assert better.first == better.low == better.high == pytest.approx(0.5)


def test_what_is_not_told_apart_at_an_end_has_no_bound_there() -> None:
    found = crossing(lines(0.2), TARGETS)
    assert found.low == found.first
    assert found.high is None


def test_a_curve_that_is_better_nowhere_is_not_taken_for_better_where_it_gets_worse() -> None:
    unclear, worse = (-0.02, -0.01, 0.01, 0.03, 0.04), (0.004, 0.005, 0.006, 0.007, 0.008)
    curves = {
        seed: [(0.8, 1.0 + unclear[seed]), (1.0, 1.0 + worse[seed])] for seed in range(len(worse))
    }
    found = crossing(curves, dict.fromkeys(range(len(worse)), (1.0, 1.0)))
    assert found.above
    assert found.low == found.first
    assert found.high is None


def test_no_line_is_drawn_on_beyond_a_seeds_own_runs() -> None:
    """One seed's cost nearly the same: its line would be far below where others were cheap."""
    curves = {seed: [(0.6, 1.03), (0.997, 1.002)] for seed in range(1, 5)}
    curves[0] = [(0.985, 0.999), (0.997, 1.01)]
    found = crossing(curves, dict.fromkeys(range(5), (1.0, 1.0)))
    assert found.first == pytest.approx(0.985)
    assert found.last == pytest.approx(0.997)
    assert found.above


@pytest.mark.parametrize(("dearest", "told"), [(0.67, False), (0.66, True)])
def test_where_seeds_have_no_cost_in_common_it_is_not_known_what_a_worse_loss_lacks(
    dearest: float, *, told: bool
) -> None:
    targets = dict.fromkeys(range(3), (1.0, 1.0))

    def ending_at(loss: float) -> Crossing | None:
        cheap = [(0.5, 1.2), (0.65, loss)]
        return crossing({0: [(dearest, loss)], 1: cheap, 2: [(0.6, 1.2), (1.0, 0.9)]}, targets)

    worse, better = ending_at(1.1), ending_at(0.9)
    assert (worse is not None) is told, "whole epochs are no nearer"
    assert better is not None
    assert better.below, "with as much as the dearest took at most"
    assert better.first == better.last == pytest.approx(dearest)


def test_a_loss_between_points_lies_on_the_line_through_them() -> None:
    curve = [(1.0, 3.0), (100.0, 1.0)]
    assert loss_at(curve, 10.0) == pytest.approx(2.0)
    assert loss_at([(5.0, 1.5)], 7.0) == 1.5


def test_a_loss_beyond_points_is_the_nearest_ones() -> None:
    """A line through points that cost nearly the same would be far off."""
    nearly_the_same = [(1.0, 1.0), (1.001, 0.98), (1.002, 0.99)]
    assert loss_at(nearly_the_same, 1.015) == 0.99
    assert loss_at(nearly_the_same, 0.99) == 1.0
