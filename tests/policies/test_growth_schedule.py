"""Growth by schedule, as a function of states: when, where, how much, and the verdict."""

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from esper.lifecycle import (
    Action,
    Advance,
    AlphaMode,
    BlueprintChoice,
    Commit,
    Germinate,
    GrowthState,
    IllegalAction,
    Prune,
    SeedStage,
    SlotState,
    check_action,
)
from esper.policies import FractionTiming, GrowthScheduleConfig, GrowthSchedulePolicy

EPOCHS = 40
CHOICES = tuple(BlueprintChoice(name=name, param_count=9) for name in ("lora", "block"))


def slot(path: str, stage: SeedStage = SeedStage.DORMANT, **changes: Any) -> SlotState:
    plain = {"path": path, "family": "transformer", "dim": 8, "stage": stage, "choices": CHOICES}
    return SlotState(**{**plain, "max_committed": 3, **changes})


def learning(path: str, **changes: Any) -> SlotState:
    """A live seed that stands at alpha 1."""
    return slot(path, SeedStage.BLENDING, live=True, alpha=1.0, **changes)


def state(*slots: SlotState, epoch: int, max_epochs: int | None = EPOCHS) -> GrowthState:
    return GrowthState(epoch=epoch, step=10 * epoch, max_epochs=max_epochs, slots=slots)


def policy(**settings: Any) -> GrowthSchedulePolicy:
    return GrowthSchedulePolicy(GrowthScheduleConfig(**settings))


def run(schedule: GrowthSchedulePolicy, *slots: SlotState) -> dict[int, Sequence[Action]]:
    """Decide at every epoch of a run in which the slots stay as they are."""
    decided = {n: schedule.decide(state(*slots, epoch=n)) for n in range(1, EPOCHS + 1)}
    return {epoch: actions for epoch, actions in decided.items() if actions}


def block(path: str, depth: int | None = None, **options: Any) -> Germinate:
    deep = {} if depth is None else {"depth": depth}
    return Germinate(slot=path, blueprint="block", options={**options, **deep})


AB = (slot("a"), slot("b"))


# When and how much


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {10: [block("a", 2), block("b", 2)]}),
        ({"factor": 2}, {10: [block("a"), block("b")]}),
        ({"slots": ("b",)}, {10: [block("b", 4)]}),
        ({"fractions": (0.5,)}, {20: [block("a", 2), block("b", 2)]}),
        ({"fractions": (0.24,)}, {10: [block("a", 2), block("b", 2)]}),
        (
            {"fractions": (0.2, 0.45)},
            {8: [block("a"), block("b")], 18: [block("a"), block("b")]},
        ),
        (
            {"options": {"source": "own"}, "factor": 2},
            {10: [block("a", source="own"), block("b", source="own")]},
        ),
    ],
)
def test_each_event_falls_at_its_share_of_the_run_and_the_depth_is_shared_evenly(
    settings: dict[str, Any], expected: dict[int, list[Action]]
):
    assert run(policy(**settings), *AB) == expected


def test_the_wish_for_optimizer_state_is_passed_on():
    schedule = policy(options={"source": "own"}, copy_optimizer_state=True)
    for action in schedule.decide(state(*AB, epoch=10)):
        assert isinstance(action, Germinate)
        assert action.copy_optimizer_state


def test_when_to_grow_is_exchangeable():
    class AfterLossesBelow:
        """Due whenever the loss is below a limit that falls with each event."""

        num_events = 2
        reads_losses = True

        def due(self, state: GrowthState, *, num_past: int) -> bool:
            return bool(state.losses) and state.losses[-1] < (4.0, 2.0)[num_past]

    schedule = GrowthSchedulePolicy(timing=AfterLossesBelow())
    assert schedule.reads_losses
    assert not policy().reads_losses
    seen = []
    for epoch, loss in enumerate((5.0, 3.0, 3.0, 1.0, 1.0), start=1):
        losses = state(*AB, epoch=epoch).model_copy(update={"losses": (loss,)})
        seen.append(list(schedule.decide(losses)))
    assert seen == [[], [block("a"), block("b")], [], [block("a"), block("b")], []]


@pytest.mark.parametrize("epochs", [1, 3, 10, 30, 56, 280])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.7])
def test_a_fraction_is_due_from_the_first_decision_that_reaches_it(epochs: int, fraction: float):
    timing = FractionTiming([fraction])
    due = [
        epoch
        for epoch in range(1, epochs + 1)
        if timing.due(state(epoch=epoch, max_epochs=epochs), num_past=0)
    ]
    # In whole tenths and hundredths, so that nothing is rounded.
    assert due == [n for n in range(1, epochs + 1) if 100 * n >= round(100 * fraction) * epochs]


# The verdict


def test_a_live_seed_learns_until_the_verdict_and_then_takes_two_gates_at_once():
    schedule = policy()
    for epoch in range(1, 11):
        schedule.decide(state(*AB, epoch=epoch))
    grown = learning("a"), learning("b", epochs_in_stage=30)
    decided = {n: schedule.decide(state(*grown, epoch=n)) for n in range(11, EPOCHS + 1)}
    both = [Advance(slot=path) for path in ("a", "a", "b", "b")]
    assert decided == {n: both if n >= 28 else [] for n in decided}


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (learning("a", epochs_in_stage=30, refusals_in_stage=2), [Advance(slot="a")] * 2),
        (
            learning("a", epochs_in_stage=30, refusals_in_stage=6),
            [Prune(slot="a", over_steps=9, reason="refused for 3 epochs in BLENDING")],
        ),
        (slot("a", SeedStage.SHADOWING, live=True, alpha=1.0), [Advance(slot="a")]),
        (
            slot("a", SeedStage.SHADOWING, alpha=1.0, epochs_in_stage=3, refusals_in_stage=3),
            [Prune(slot="a", over_steps=9, reason="refused for 3 epochs in SHADOWING")],
        ),
        (slot("a", SeedStage.PROBATIONARY, live=True, alpha=1.0), [Commit(slot="a")]),
        (learning("a", fading=True), []),
    ],
)
def test_patience_counts_from_the_verdict(seed: SlotState, expected: list[Action]):
    schedule = policy(patience_epochs=3, fade_steps=9)
    schedule.decide(state(*AB, epoch=10))
    assert list(schedule.decide(state(seed, slot("b"), epoch=30))) == expected


def test_seeds_behind_the_host_and_alphas_that_move_are_tended_at_any_time():
    isolated = slot("a", SeedStage.BLENDING, alpha=1.0)
    moving = learning("b", alpha_mode=AlphaMode.UP)
    for epoch in (1, 20):
        schedule = policy(fractions=(0.6,))
        assert schedule.decide(state(isolated, moving, epoch=epoch)) == [Advance(slot="a")]


# Several events


def test_a_later_event_calls_the_verdict_and_grows_where_the_seed_is_committed():
    schedule = policy(fractions=(0.2, 0.45))
    assert schedule.decide(state(*AB, epoch=8)) == [block("a"), block("b")]
    assert schedule.decide(state(learning("a"), learning("b"), epoch=17)) == []
    called = [Advance(slot=path) for path in ("a", "a", "b", "b")]
    assert schedule.decide(state(learning("a"), learning("b"), epoch=18)) == called
    on_trial = slot("a", SeedStage.PROBATIONARY, live=True, alpha=1.0)
    committed = slot("b", SeedStage.FOSSILIZED, committed=1, max_committed=2)
    assert schedule.decide(state(on_trial, committed, epoch=20)) == [Commit(slot="a"), block("b")]
    committed = slot("a", SeedStage.FOSSILIZED, committed=1, max_committed=2)
    assert schedule.decide(state(committed, learning("b"), epoch=21)) == [block("a")]
    assert schedule.decide(state(learning("a"), learning("b"), epoch=22)) == []


@pytest.mark.parametrize(
    ("occupied", "epoch"),
    [
        (slot("a", SeedStage.EMBARGOED), 18),
        (learning("a", fading=True), 18),
        (slot("a", SeedStage.TERMINATED, committed=1), 18),
        (slot("a", SeedStage.PROBATIONARY, live=True, alpha=1.0), 28),
    ],
)
def test_a_slot_that_cannot_take_part_is_asked_once_and_its_refusal_tells(
    occupied: SlotState, epoch: int
):
    schedule = policy(fractions=(0.2, 0.45))
    schedule.decide(state(*AB, epoch=8))
    schedule.decide(state(learning("a"), learning("b"), epoch=18)) if epoch > 18 else None
    seen = state(occupied, slot("b"), epoch=epoch)
    asked = [action for action in schedule.decide(seen) if isinstance(action, Germinate)]
    assert asked == [block("a"), block("b")]
    with pytest.raises(IllegalAction, match="germinate is not legal for slot 'a'"):
        check_action(seen, asked[0])
    later = schedule.decide(state(occupied, slot("b"), epoch=epoch + 1))
    assert not any(isinstance(action, Germinate) for action in later)


def test_events_that_overtake_each_other_lose_no_block():
    schedule = policy(factor=4, fractions=(0.2, 0.25, 0.3), slots=("a",))
    assert schedule.decide(state(*AB, epoch=8)) == [block("a", 2)]
    for epoch in (10, 12):
        decided = schedule.decide(state(learning("a"), slot("b"), epoch=epoch))
        assert Germinate not in map(type, decided)
    for committed in (1, 2):
        free = slot("a", SeedStage.FOSSILIZED, committed=committed)
        assert schedule.decide(state(free, slot("b"), epoch=14 + committed)) == [block("a", 2)]


# What is refused


def test_copies_are_planned_where_no_block_built_anew_fits():
    slots = tuple(slot(path, choices=()) for path in "ab")
    expected = {10: [block("a", 2, source="own"), block("b", 2, source="own")]}
    assert run(policy(options={"source": "own"}), *slots) == expected


@pytest.mark.parametrize(
    ("settings", "slots", "message"),
    [
        ({}, AB[:1], r"at least 2 layers, one behind each slot, and there are 1 slots"),
        ({"min_layers": 3}, AB, r"at least 3 layers"),
        (
            {"factor": 2, "fractions": (0.2, 0.4)},
            AB,
            r"2 layers grown by a factor of 2 are 2 new blocks, which 2 slots at 2 events",
        ),
        ({"slots": ("c",)}, AB, r"there is no slot 'c'; slots: 'a', 'b'"),
        (
            {"factor": 5, "fractions": (0.1, 0.2, 0.3, 0.4)},
            AB,
            r"4 events .* slot 'a' has room for 3; raise max_committed",
        ),
        ({"blueprint": "conv"}, AB, r"'conv' of the schedule does not fit slot 'a'; fitting: lora"),
        ({"blueprint": "lora"}, AB, r"2 blocks in one seed, and blueprint 'lora' .* no option"),
        ({"options": {"heads": 3}}, AB, r"the width 8 is not divisible by heads=3"),
        ({"options": {"head": 3}}, AB, r"has no option 'head'; did you mean 'heads'"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_at_the_first_decision(
    settings: dict[str, Any], slots: tuple[SlotState, ...], message: str
):
    with pytest.raises(ValueError, match=message):
        policy(**settings).decide(state(*slots, epoch=1))


def test_a_run_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"run's length; .*max_epochs=.*; a callback .*max_steps"):
        policy().decide(state(*AB, epoch=1, max_epochs=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 1}, "greater than or equal to 2"),
        ({"fractions": ()}, "at least 1 item"),
        ({"fractions": (0.0,)}, "greater than 0"),
        ({"fractions": (0.4, 0.2)}, "fractions must rise"),
        ({"fractions": (0.7,)}, "before verdict_fraction 0.7"),
        ({"slots": ()}, "slots must name each slot once and at least one"),
        ({"slots": ("a", "b", "a")}, "slots must name each slot once and at least one"),
        ({"options": {"depth": 2}}, "must leave out 'depth'"),
        ({"copy_optimizer_state": True}, "needs copies"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        GrowthScheduleConfig(**settings)


# What it wants weighed


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (9, ["behind"]),
        (10, ["live", "behind"]),  # an event calls the verdict
        (11, ["behind"]),
        (27, ["behind"]),
        (28, ["live", "behind"]),  # the last call, at 0.7 of the run
        (39, ["live", "behind"]),
    ],
)
def test_live_seeds_are_weighed_for_a_verdict_only(epoch: int, expected: list[str]) -> None:
    slots = (learning("live"), slot("behind", SeedStage.BLENDING, alpha=1.0))
    schedule = policy(factor=2)
    for past in range(1, epoch):
        schedule.decide(state(slot("live"), slot("behind"), epoch=past))
    assert list(schedule.weighs(state(*slots, epoch=epoch))) == expected
