"""When the slope of the loss says that it is time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.lifecycle.actions import GrowthState
from esper.policies import GrowthScheduleConfig, SlopeTiming, slope_policy
from esper.policies.timing import power_law_exponent

EPOCHS = 400


def due_at(losses: list[float], **settings: float) -> float:
    """Return the share of the run at which it is due."""
    limits = {"earliest_fraction": 0.0, "latest_fraction": 1.0} | settings
    timing = SlopeTiming(limits.pop("max_drop_fraction"), **limits)
    for epoch in range(1, EPOCHS + 1):
        state = GrowthState(
            epoch=epoch, step=epoch, max_epochs=EPOCHS, train_losses=tuple(losses[:epoch])
        )
        if timing.due(state, num_past=0):
            return epoch / EPOCHS
    return math.inf


def power_law(exponent: float, scale: float = 3.0) -> list[float]:
    return [scale * epoch**-exponent for epoch in range(1, EPOCHS + 1)]


@given(st.floats(0.02, 2.0), st.floats(0.05, 2.0), st.floats(0.1, 100.0))
def test_a_power_law_is_left_where_its_slope_would_save_the_share(
    exponent: float, share: float, scale: float
) -> None:
    """b (1 - f) / f = θ at f = b / (b + θ), whatever the unit of the loss."""
    found = due_at(power_law(exponent, scale), max_drop_fraction=share)
    expected = max(exponent / (exponent + share), 6 / EPOCHS)  # three epochs in the later half
    assert found == pytest.approx(expected, abs=1.01 / EPOCHS)


def test_what_learns_faster_stays_small_for_longer() -> None:
    found = [due_at(power_law(b), max_drop_fraction=0.6) for b in (0.1, 0.2, 0.4, 0.8)]
    assert found == sorted(found)
    assert len(set(found)) == 4


def test_it_is_due_between_the_earliest_and_the_latest_share_only() -> None:
    flat, steep = power_law(1e-6), power_law(5.0)
    limits = {"max_drop_fraction": 0.5, "earliest_fraction": 0.2, "latest_fraction": 0.6}
    assert due_at(flat, **limits) == 0.2
    assert due_at(steep, **limits) == 0.6


def test_epochs_without_a_finite_loss_are_left_out() -> None:
    losses = power_law(0.3)
    losses[60::7] = [math.nan] * len(losses[60::7])
    assert power_law_exponent(losses) == pytest.approx(0.3)
    assert power_law_exponent([math.nan] * 9) is None
    assert due_at(losses, max_drop_fraction=0.6) == pytest.approx(1 / 3, abs=2 / EPOCHS)


def test_a_loop_that_does_not_tell_the_training_loss_is_told_how() -> None:
    timing = SlopeTiming(0.5, earliest_fraction=0.1, latest_fraction=0.5)
    state = GrowthState(epoch=2, step=2, max_epochs=9, losses=(1.0, 0.9), train_losses=(1.0,))
    with pytest.raises(ValueError, match=r"after_epoch\(evaluate, train_loss=…\)"):
        timing.due(state, num_past=0)


@pytest.mark.parametrize(
    ("drop", "earliest", "latest"),
    [(0.0, 0.1, 0.5), (-1.0, 0.1, 0.5), (math.nan, 0.1, 0.5), (0.5, 0.6, 0.5), (0.5, -0.1, 0.5)],
)
def test_limits_that_make_no_sense_are_refused(drop: float, earliest: float, latest: float) -> None:
    with pytest.raises(ValueError, match="must"):
        SlopeTiming(drop, earliest_fraction=earliest, latest_fraction=latest)


def test_the_policy_by_slope_has_a_name_and_reads_no_held_out_loss() -> None:
    policy = slope_policy(GrowthScheduleConfig())
    assert policy.name == "slope"
    assert not policy.reads_losses


def test_the_slope_is_that_of_the_later_half() -> None:
    losses = power_law(0.3)[:40]
    losses[:20] = [100.0 * loss for loss in losses[:20]]
    assert power_law_exponent(losses) == pytest.approx(0.3)
