"""Curves and the alpha controller, mostly as invariants."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.blending import AlphaController, AlphaState, curve_value
from esper.lifecycle import AlphaCurve, AlphaMode

FRACTIONS = st.floats(0.0, 1.0)
CURVES = st.sampled_from(AlphaCurve)
STEEPNESS = st.floats(0.0, 500.0, exclude_min=True) | st.floats(0.5, 30.0)


@given(curve=CURVES, steepness=STEEPNESS)
@example(curve=AlphaCurve.SIGMOID, steepness=5e-324)
@example(curve=AlphaCurve.SIGMOID, steepness=0.1)
@example(curve=AlphaCurve.SIGMOID, steepness=500.0)
def test_a_curve_starts_at_zero_and_ends_at_one_exactly(curve: AlphaCurve, steepness: float):
    assert curve_value(curve, 0.0, steepness=steepness) == 0.0
    assert curve_value(curve, 1.0, steepness=steepness) == 1.0


@given(curve=CURVES, steepness=STEEPNESS, progress=st.tuples(FRACTIONS, FRACTIONS))
def test_a_curve_never_falls_and_stays_between_its_ends(
    curve: AlphaCurve, steepness: float, progress: tuple[float, float]
):
    earlier, later = (curve_value(curve, p, steepness=steepness) for p in sorted(progress))
    assert 0.0 <= earlier <= 1.0
    assert 0.0 <= later <= 1.0
    assert earlier <= math.nextafter(later, 2.0)


@given(curve=CURVES, steepness=STEEPNESS, progress=FRACTIONS)
def test_a_curve_is_symmetric_about_its_middle(
    curve: AlphaCurve, steepness: float, progress: float
):
    mirrored = 1.0 - curve_value(curve, 1.0 - progress, steepness=steepness)
    assert curve_value(curve, progress, steepness=steepness) == pytest.approx(mirrored, abs=1e-12)


@given(progress=FRACTIONS, steepness=st.floats(0.1, 60.0))
def test_curves_follow_their_formulas(progress: float, steepness: float):
    def logistic(value: float) -> float:
        return 1.0 / (1.0 + math.exp(-value))

    low, high = logistic(-steepness / 2), logistic(steepness / 2)
    sigmoid = (logistic(steepness * (progress - 0.5)) - low) / (high - low)
    cosine = math.sin(0.5 * math.pi * progress) ** 2
    for curve, expected in (
        (AlphaCurve.LINEAR, progress),
        (AlphaCurve.COSINE, cosine),
        (AlphaCurve.SIGMOID, sigmoid),
    ):
        found = curve_value(curve, progress, steepness=steepness)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("progress", [-1e-9, 1.0 + 1e-9, math.nan, math.inf])
def test_progress_outside_the_ramp_is_refused(progress: float):
    with pytest.raises(ValueError, match="progress must lie in"):
        curve_value(AlphaCurve.LINEAR, progress)


@pytest.mark.parametrize("steepness", [0.0, -1.0, 500.1, math.nan, math.inf])
def test_steepness_out_of_range_is_refused_before_anything_moves(steepness: float):
    with pytest.raises(ValueError, match="steepness must lie in"):
        curve_value(AlphaCurve.SIGMOID, 0.5, steepness=steepness)
    controller = AlphaController()
    with pytest.raises(ValueError, match="steepness must lie in"):
        controller.retarget(1.0, 10, steepness=steepness)
    assert controller.state == AlphaState()


def ramp(
    start: float, target: float, steps: int, curve: AlphaCurve, steepness: float
) -> AlphaController:
    """Return a controller that stands at `start` and has just been sent to `target`."""
    controller = AlphaController(AlphaState(alpha=start, start=start, target=start))
    controller.retarget(target, steps, curve=curve, steepness=steepness)
    return controller


RAMPS = {
    "start": FRACTIONS,
    "target": FRACTIONS,
    "steps": st.integers(1, 60),
    "curve": CURVES,
    "steepness": STEEPNESS,
}


@given(**RAMPS)
# A saturated curve rounds past these targets: 0.06 + (0.87 - 0.06) > 0.87.
@example(start=0.06, target=0.87, steps=20, curve=AlphaCurve.SIGMOID, steepness=500.0)
@example(start=0.94, target=0.42, steps=20, curve=AlphaCurve.SIGMOID, steepness=500.0)
def test_alpha_moves_one_way_and_snaps_to_its_target_on_the_last_step(
    start: float, target: float, steps: int, curve: AlphaCurve, steepness: float
):
    if start == target:
        return
    controller = ramp(start, target, steps, curve, steepness)
    up = target > start
    assert controller.alpha == start
    assert controller.mode is (AlphaMode.UP if up else AlphaMode.DOWN)
    alphas = [start]
    for step in range(1, steps + 1):
        arrived = controller.tick()
        alphas.append(controller.alpha)
        assert arrived == (step == steps)
        assert (controller.mode is AlphaMode.HOLD) == arrived
    assert alphas == sorted(alphas, reverse=not up)
    assert controller.alpha == target
    assert all(min(start, target) <= alpha <= max(start, target) for alpha in alphas)
    for held in range(1, 4):
        assert not controller.tick()
        assert (controller.alpha, controller.state.steps_held) == (target, held)


@given(start=FRACTIONS, target=FRACTIONS, steps=st.integers(1, 60), done=st.integers(0, 60))
def test_a_linear_ramp_stands_at_its_share_of_the_way(
    start: float, target: float, steps: int, done: int
):
    if start == target or done > steps:
        return
    controller = ramp(start, target, steps, AlphaCurve.LINEAR, 8.0)
    for _ in range(done):
        controller.tick()
    expected = start + (target - start) * done / steps
    assert controller.alpha == pytest.approx(expected, abs=1e-12)


@given(start=FRACTIONS, target=FRACTIONS, curve=CURVES)
def test_a_ramp_of_no_steps_arrives_at_once(start: float, target: float, curve: AlphaCurve):
    if start == target:
        return
    controller = ramp(start, target, 0, curve, 8.0)
    assert (controller.alpha, controller.mode) == (target, AlphaMode.HOLD)
    assert not controller.tick()
    assert controller.state.steps_held == 1


@given(**RAMPS, ticks=st.integers(0, 70), again=FRACTIONS)
def test_alpha_is_retargeted_only_from_hold_and_a_refusal_changes_nothing(
    start: float,
    target: float,
    steps: int,
    curve: AlphaCurve,
    steepness: float,
    ticks: int,
    again: float,
):
    if start == target:
        return
    controller = ramp(start, target, steps, curve, steepness)
    for _ in range(ticks):
        controller.tick()
    before = controller.state
    if ticks < steps:
        with pytest.raises(ValueError, match=rf"{ticks} of {steps} steps done, and takes no"):
            controller.retarget(again, 5)
        assert controller.state == before
        controller.hold()
    if controller.alpha != again:
        controller.retarget(again, 5)
        assert controller.state.target == again


@pytest.mark.parametrize(
    ("target", "steps", "message"),
    [
        (1.0001, 5, r"must lie in \[0, 1\], got 1.0001"),
        (-0.1, 5, r"must lie in \[0, 1\], got -0.1"),
        (math.nan, 5, r"must lie in \[0, 1\], got nan"),
        (math.inf, 5, r"must lie in \[0, 1\], got inf"),
        (0.5, -1, "steps must not be negative, got -1"),
        (0.25, 5, "already stands at 0.25; there is nothing to ramp"),
    ],
)
def test_an_impossible_target_is_refused_and_changes_nothing(
    target: float, steps: int, message: str
):
    state = AlphaState(alpha=0.25, start=0.25, target=0.25, steps_held=7)
    controller = AlphaController(state)
    with pytest.raises(ValueError, match=message):
        controller.retarget(target, steps)
    assert controller.state == state


@given(**RAMPS, ticks=st.integers(0, 70))
def test_hold_stops_a_ramp_where_it_is_and_leaves_a_holding_controller_alone(
    start: float, target: float, steps: int, curve: AlphaCurve, steepness: float, ticks: int
):
    if start == target:
        return
    controller = ramp(start, target, steps, curve, steepness)
    for _ in range(ticks):
        controller.tick()
    before, alpha = controller.state, controller.alpha
    controller.hold()
    assert (controller.alpha, controller.mode) == (alpha, AlphaMode.HOLD)
    if before.mode is AlphaMode.HOLD:
        assert controller.state == before
    else:
        assert controller.state == AlphaState(alpha=alpha, start=alpha, target=alpha)
    controller.tick()
    assert controller.alpha == alpha


@given(**RAMPS, ticks=st.integers(0, 70))
def test_a_state_restored_from_json_continues_identically(
    start: float, target: float, steps: int, curve: AlphaCurve, steepness: float, ticks: int
):
    if start == target:
        return
    controller = ramp(start, target, steps, curve, steepness)
    for _ in range(ticks):
        controller.tick()
    restored = AlphaController(AlphaState.model_validate_json(controller.state.model_dump_json()))
    for _ in range(steps + 2):
        assert restored.state == controller.state
        assert restored.tick() == controller.tick()
    assert restored.state == controller.state


@pytest.mark.parametrize(
    "field",
    [{"alpha": 1.5}, {"target": -0.1}, {"alpha": math.nan}, {"steps_done": -1}, {"speed": 1.0}],
    ids=str,
)
def test_a_state_out_of_range_is_refused(field: dict[str, float]):
    with pytest.raises(ValidationError, match=next(iter(field))):
        AlphaState(**field)
