"""Policies decide on states alone: what they do when, and that it is legal."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.lifecycle import (
    Action,
    Advance,
    AlphaMode,
    BlueprintChoice,
    Commit,
    Germinate,
    GrowthState,
    Operation,
    Prune,
    SeedStage,
    SetAlphaTarget,
    SlotState,
    Wait,
    check_action,
)
from esper.policies import (
    POLICY_NAMES,
    GrowthSchedulePolicy,
    HeuristicConfig,
    HeuristicPolicy,
    PlannedPolicy,
    RandomPolicy,
    ReplayPolicy,
    named_policy,
    tend,
)

FLAT = (1.0,) * 50
FALLING = tuple(0.5**epoch for epoch in range(50))
CHOICES = tuple(
    BlueprintChoice(name=name, param_count=count)
    for name, count in (("noop", 0), ("norm", 16), ("conv_light", 600))
)
LIVING = ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY")


def slot(path: str = "a", stage: SeedStage = SeedStage.DORMANT, **changes: Any) -> SlotState:
    plain = {"path": path, "family": "cnn", "dim": 8, "stage": stage, "choices": CHOICES}
    return SlotState(**{**plain, **changes})


def state(*slots: SlotState, epoch: int = 10, **changes: Any) -> GrowthState:
    plain = {"epoch": epoch, "step": 10 * epoch, "losses": FLAT[:epoch], "slots": slots}
    return GrowthState(**{**plain, **changes})


def grown(policy: HeuristicPolicy, *states: GrowthState) -> list[tuple[str, str]]:
    actions = itertools.chain.from_iterable(policy.decide(each) for each in states)
    return [(action.slot, action.blueprint) for action in actions if isinstance(action, Germinate)]


# Tending


@pytest.mark.parametrize("stage", SeedStage, ids=lambda stage: stage.name)
def test_a_living_seed_tries_its_next_gate_and_nothing_else_is_touched(stage: SeedStage):
    actions = tend(slot(stage=stage), patience_epochs=3, fade_steps=7)
    if stage is SeedStage.PROBATIONARY:
        assert actions == [Commit(slot="a")]
    elif stage.name in LIVING:
        assert actions == [Advance(slot="a")]
    else:
        assert actions == []


@pytest.mark.parametrize("stage", SeedStage, ids=lambda stage: stage.name)
def test_a_moving_alpha_or_a_fade_out_is_waited_for(stage: SeedStage):
    impatient: dict[str, Any] = {"patience_epochs": 1, "fade_steps": 7}
    refused: dict[str, Any] = {"refusals_in_stage": 9, "epochs_in_stage": 9}
    changes: dict[str, Any]
    for changes in ({"alpha_mode": AlphaMode.UP}, {"fading": True}):
        assert tend(slot(stage=stage, **refused, **changes), **impatient) == []


@pytest.mark.parametrize("stage", LIVING)
def test_a_seed_that_is_refused_for_too_long_is_pruned_with_the_reason(stage: str):
    def after(epochs: int, refusals: int) -> list[Action]:
        refused = slot(stage=SeedStage[stage], epochs_in_stage=epochs, refusals_in_stage=refusals)
        return list(tend(refused, patience_epochs=6, fade_steps=7))

    assert after(6, 1) == [Prune(slot="a", over_steps=7, reason=f"refused for 6 epochs in {stage}")]
    for still in (after(5, 5), after(9, 0)):
        assert [type(action) for action in still] in ([Advance], [Commit])


# The heuristic


def test_nothing_germinates_before_the_warm_up_ends():
    config = HeuristicConfig(warmup_epochs=7, plateau_epochs=2, max_refusals=None)
    policy = HeuristicPolicy(config)
    epochs = [epoch for epoch in range(12) if grown(policy, state(slot(), epoch=epoch))]
    assert epochs[0] == 7
    assert epochs == list(range(7, 12))


def test_nothing_germinates_before_there_is_a_window_to_compare_with():
    config = HeuristicConfig(warmup_epochs=0, plateau_epochs=4)
    for epoch in range(5):
        assert grown(HeuristicPolicy(config), state(slot(), epoch=epoch)) == []
    assert grown(HeuristicPolicy(config), state(slot(), epoch=5)) == [("a", "norm")]
    resumed = state(slot(), epoch=30, losses=(1.0, 1.0))
    assert grown(HeuristicPolicy(config), resumed) == []


@pytest.mark.parametrize(
    ("losses", "germinates"),
    [
        (FLAT, True),
        (FALLING, False),
        ((1.0,) * 7 + (0.91,) * 3, True),
        ((1.0,) * 7 + (0.89,) * 3, False),
        ((1.0,) * 7 + (0.89, 2.0, 2.0), False),
        ((0.5,) + (1.0,) * 6 + (0.5,) * 3, True),
        # A loss below zero, as a density's may be.
        ((-1.0,) * 10, True),
        ((-1.0,) * 7 + (-1.09,) * 3, True),
        ((-1.0,) * 7 + (-1.11,) * 3, False),
        # What is not a number tells nothing, wherever it stands.
        ((math.nan,) + (1.0,) * 9, True),
        ((1.0,) * 7 + (math.nan, 1.0, 1.0), True),
        ((1.0,) * 7 + (math.nan, 0.5, 1.0), False),
        ((math.nan,) * 7 + (1.0,) * 3, False),
        ((1.0,) * 7 + (math.nan,) * 3, False),
    ],
)
def test_a_seed_germinates_when_the_loss_has_stopped_falling(
    losses: tuple[float, ...], germinates: bool
):
    policy = HeuristicPolicy(HeuristicConfig(plateau_epochs=3, plateau_fraction=0.1))
    decided = policy.decide(state(slot(), losses=losses[:10]))
    assert list(decided) == ([Germinate(slot="a", blueprint="norm")] if germinates else [])


def test_a_seed_that_somebody_else_has_germinated_is_not_taken_for_the_policys_own():
    policy = HeuristicPolicy(HeuristicConfig(max_refusals=None))
    assert grown(policy, state(slot())) == [("a", "norm")]
    other = slot(stage=SeedStage.TRAINING, blueprint="conv_light")
    policy.decide(state(other, epoch=11))
    policy.decide(state(slot(committed=1), epoch=12))
    assert policy.state_dict()["committed"] == {}


def test_nothing_germinates_too_late_to_commit():
    config = HeuristicConfig(last_germination_fraction=0.7)
    for max_epochs, expected in ((20, [("a", "norm")]), (19, []), (None, [("a", "norm")])):
        found = grown(HeuristicPolicy(config), state(slot(), epoch=14, max_epochs=max_epochs))
        assert found == expected


@pytest.mark.parametrize("max_living", [1, 2, 3])
def test_no_more_seeds_live_than_allowed(max_living: int):
    config = HeuristicConfig(max_living=max_living)
    for num_living in range(5):
        living = [slot(f"l{index}", SeedStage.TRAINING) for index in range(num_living)]
        others = [slot("free"), slot("cooling", SeedStage.EMBARGOED)]
        found = grown(HeuristicPolicy(config), state(*living, *others))
        assert len(found) == int(num_living < max_living)


def test_slots_and_blueprints_are_tried_evenly_cheapest_first_and_never_the_free_ones():
    both = state(slot("a"), slot("b"))
    tried = grown(HeuristicPolicy(), *[both] * 8)
    round_of_four = [("a", "norm"), ("a", "conv_light"), ("b", "norm"), ("b", "conv_light")]
    assert tried == round_of_four * 2


def test_linear_maps_are_tried_after_all_others_unless_blueprints_are_chosen():
    linear = (BlueprintChoice(name="lora", param_count=16, linear=True), *CHOICES[1:])
    both = state(slot("a", choices=linear), slot("b", choices=linear))
    others = [("a", "norm"), ("a", "conv_light"), ("b", "norm"), ("b", "conv_light")]
    tried = grown(HeuristicPolicy(), *[both] * 12)
    assert tried == [*others, ("a", "lora"), ("b", "lora"), *others, ("a", "lora"), ("b", "lora")]
    chosen = HeuristicConfig(blueprints=("lora", "conv_light"))
    assert grown(HeuristicPolicy(chosen), both) == [("a", "lora")]


def test_what_was_refused_too_often_in_a_slot_is_left_alone_until_something_is_committed():
    policy = HeuristicPolicy(HeuristicConfig(blueprints=("norm",), max_refusals=2))
    growing = slot("a", SeedStage.TRAINING)
    cycle = [state(slot("a")), state(growing), state(growing), state(slot("a"))]
    assert grown(policy, *cycle[:3]) == [("a", "norm")]
    assert grown(policy, *cycle * 3) == [("a", "norm")]
    assert grown(policy, state(slot("a"), slot("b"))) == [("b", "norm")]
    committed = slot("b", SeedStage.FOSSILIZED, committed=1, max_committed=1)
    assert grown(policy, state(slot("a"), committed)) == [("a", "norm")]
    assert grown(policy, *cycle) == [("a", "norm")]
    assert grown(policy, *cycle * 3) == []


def test_a_commit_is_no_refusal_and_without_a_limit_nothing_is_left_alone():
    policy = HeuristicPolicy(HeuristicConfig(blueprints=("norm",), max_refusals=1))
    for committed in range(1, 4):
        before = slot("a", SeedStage.FOSSILIZED, committed=committed, max_committed=9)
        assert grown(policy, state(before)) == [("a", "norm")]
        assert grown(policy, state(slot("a", SeedStage.TRAINING, committed=committed))) == []
    endless = HeuristicPolicy(HeuristicConfig(blueprints=("norm",), max_refusals=None))
    assert grown(endless, *[state(slot("a"))] * 9) == [("a", "norm")] * 9


def test_only_the_named_blueprints_are_tried_in_the_order_given():
    named = HeuristicConfig(blueprints=("conv_light", "norm"))
    assert grown(HeuristicPolicy(named), *[state(slot())] * 2) == [
        ("a", "conv_light"),
        ("a", "norm"),
    ]


def test_a_named_blueprint_is_tried_also_if_it_has_no_parameters():
    assert grown(HeuristicPolicy(HeuristicConfig(blueprints=("noop",))), state(slot())) == [
        ("a", "noop")
    ]


@pytest.mark.parametrize("epoch", [1, 10])
def test_a_named_blueprint_that_fits_no_slot_is_refused_at_the_first_decision(epoch: int):
    unfit = HeuristicPolicy(HeuristicConfig(blueprints=("norm", "lora")))
    with pytest.raises(ValueError, match="'lora' of the heuristic fits no slot; fitting: conv"):
        unfit.decide(state(slot(), epoch=epoch))


def test_what_was_committed_in_one_slot_is_preferred_in_the_next():
    policy = HeuristicPolicy(HeuristicConfig(blueprints=("norm", "conv_light")))
    busy = slot("b", SeedStage.EMBARGOED)
    assert grown(policy, state(slot("a"), busy), state(slot("a"), busy)) == [
        ("a", "norm"),
        ("a", "conv_light"),
    ]
    committed = slot("a", SeedStage.FOSSILIZED, committed=1)
    assert grown(policy, state(committed, slot("b"))) == [("b", "conv_light")]


def test_the_heuristic_tends_what_grows_before_it_germinates():
    policy = HeuristicPolicy(HeuristicConfig(max_living=3, patience_epochs=2, fade_steps=5))
    refused = slot("b", SeedStage.BLENDING, epochs_in_stage=2, refusals_in_stage=1)
    trial = slot("c", SeedStage.PROBATIONARY)
    assert list(policy.decide(state(slot("a"), refused, trial))) == [
        Prune(slot="b", over_steps=5, reason="refused for 2 epochs in BLENDING"),
        Commit(slot="c"),
        Germinate(slot="a", blueprint="norm"),
    ]


@given(data=st.data(), max_living=st.integers(1, 3), warmup=st.integers(0, 5))
def test_whatever_the_state_the_heuristic_asks_only_for_what_is_legal(
    growth_states: st.SearchStrategy[GrowthState],
    data: st.DataObject,
    max_living: int,
    warmup: int,
):
    config = HeuristicConfig(max_living=max_living, warmup_epochs=warmup, plateau_epochs=2)
    policy = HeuristicPolicy(config)
    for _ in range(2):
        seen = data.draw(growth_states)
        actions = policy.decide(seen)
        for action in actions:
            check_action(seen, action)
        slots = [action.slot for action in actions if not isinstance(action, Wait)]
        assert len(set(slots)) == len(slots)


# The others


def test_seeds_are_weighed_where_their_next_gate_may_ask_for_it():
    stages = list(SeedStage)
    seen = state(*(slot(stage.name, stage) for stage in stages))
    expected = [stage.name for stage in stages if stage is not SeedStage.BLENDING]
    for policy in (HeuristicPolicy(), RandomPolicy()):
        assert list(policy.weighs(seen)) == expected


@given(data=st.data(), random_seed=st.integers(0, 2**32))
def test_the_random_policy_takes_one_legal_action_and_the_same_one_for_the_same_seed(
    growth_states: st.SearchStrategy[GrowthState], data: st.DataObject, random_seed: int
):
    seen = data.draw(st.lists(growth_states, min_size=1, max_size=4))
    twin, policy = RandomPolicy(random_seed), RandomPolicy(random_seed)
    for each in seen:
        (action,) = policy.decide(each)
        check_action(each, action)
        assert list(twin.decide(each)) == [action]


def test_the_random_policy_takes_every_legal_action_sooner_or_later_and_about_equally_often():
    seen = state(slot("a"), slot("b", SeedStage.BLENDING), slot("c", SeedStage.PROBATIONARY))
    policy = RandomPolicy(0)
    taken = [policy.decide(seen)[0] for _ in range(1400)]
    counts = {
        pair: sum(1 for action in taken if (action.operation, getattr(action, "slot", "")) == pair)
        for pair in [
            (Operation.WAIT, ""),
            (Operation.GERMINATE, "a"),
            (Operation.ADVANCE, "b"),
            (Operation.SET_ALPHA_TARGET, "b"),
            (Operation.PRUNE, "b"),
            (Operation.PRUNE, "c"),
            (Operation.COMMIT, "c"),
        ]
    }
    assert sum(counts.values()) == 1400
    # 200 expected of each; 5 standard deviations are 65.
    assert all(135 < count < 265 for count in counts.values())
    blueprints = {action.blueprint for action in taken if isinstance(action, Germinate)}
    assert blueprints == {"noop", "norm", "conv_light"}
    assert {action.target for action in taken if isinstance(action, SetAlphaTarget)} == {0.5, 1.0}


def test_two_random_seeds_choose_differently():
    seen = state(slot("a"), slot("b", SeedStage.BLENDING))
    first, second = RandomPolicy(1), RandomPolicy(2)
    assert [first.decide(seen) for _ in range(20)] != [second.decide(seen) for _ in range(20)]


def test_the_schedule_does_what_it_is_told_when_it_is_told():
    plan = {
        2: [Germinate(slot="a", blueprint="norm")],
        4: [SetAlphaTarget(slot="a", target=0.5, steps=3), Prune(slot="b")],
    }
    policy = PlannedPolicy(plan, tend_seeds=False)
    living = slot("a", SeedStage.TRAINING, epochs_in_stage=9, refusals_in_stage=9)
    for epoch in range(6):
        assert list(policy.decide(state(living, slot("b"), epoch=epoch))) == plan.get(epoch, [])


@pytest.mark.parametrize(
    ("plan", "error", "told"),
    [
        ({0: [Wait()]}, ValueError, "counted from 1, got 0"),
        ({"1": [Wait()]}, TypeError, "counted from 1, to lists of actions, got '1' as an epoch"),
        ({1.5: [Wait()]}, TypeError, "got 1.5 as an epoch"),
        ({1: "mlp"}, TypeError, r"as {1: \[Germinate\(.*, got 'mlp' for epoch 1"),
        ({2: ["mlp"]}, TypeError, r"got \['mlp'\] for epoch 2"),
        ({1: Prune(slot="a")}, TypeError, r"got Prune\(.* for epoch 1"),
        ({1: {"a": Wait()}}, TypeError, r"got {'a': Wait\(.* for epoch 1"),
    ],
)
def test_what_is_no_plan_is_refused_at_once(plan: Any, error: type[Exception], told: str):
    with pytest.raises(error, match=told):
        PlannedPolicy(plan)


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (Prune(slot="c"), "there is no slot 'c'; slots: 'a', 'b'"),
        (Germinate(slot="a", blueprint="nrom"), "'nrom' does not fit slot 'a'; fitting: noop, nor"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_at_the_first_decision_and_not_when_it_is_past(
    action: Action, told: str
):
    policy = PlannedPolicy({5: [Wait(), action]})
    for epoch in (1, 5):
        with pytest.raises(ValueError, match=told):
            policy.decide(state(slot("a"), slot("b"), epoch=epoch))
    assert policy.decide(state(slot("a"), slot("b"), epoch=6)) == []
    with_options = Germinate(slot="a", blueprint="block", options={"source": "a"})
    assert PlannedPolicy({1: [with_options]}).decide(state(slot("a"), epoch=1)) == [with_options]


def test_the_schedule_tends_seeds_first_unless_told_not_to():
    policy = PlannedPolicy({3: [Wait()]}, patience_epochs=4, fade_steps=9)
    young = slot("a", SeedStage.TRAINING, epochs_in_stage=3, refusals_in_stage=1)
    old = slot("b", SeedStage.SHADOWING, epochs_in_stage=4, refusals_in_stage=1)
    assert list(policy.decide(state(young, old, epoch=3))) == [
        Advance(slot="a"),
        Prune(slot="b", over_steps=9, reason="refused for 4 epochs in SHADOWING"),
        Wait(),
    ]
    assert PlannedPolicy({}).decide(state(slot())) == []


def test_policies_are_made_by_name():
    made = {name: named_policy(name, random_seed=5) for name in POLICY_NAMES}
    assert {name: type(policy) for name, policy in made.items()} == {
        "heuristic": HeuristicPolicy,
        "ucb1": HeuristicPolicy,
        "schedule": GrowthSchedulePolicy,
        "slope": GrowthSchedulePolicy,
        "random": RandomPolicy,
        "none": PlannedPolicy,
    }
    seen = state(slot("a"), slot("b", SeedStage.BLENDING))
    assert made["none"].decide(state(slot())) == []
    alike = RandomPolicy(5)
    for _ in range(20):
        assert made["random"].decide(seen) == alike.decide(seen)


def test_an_unknown_policy_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(ValueError, match=r"no policy 'heuristics'; did you mean 'heuristic'\?"):
        named_policy("heuristics", random_seed=0)
    with pytest.raises(
        ValueError, match=r"no policy 'x'; policies: heuristic, ucb1, schedule, slope, random, none"
    ):
        named_policy("x", random_seed=0)


# Replay


def test_what_is_replayed_is_tried_again_when_it_is_pruned_and_not_when_it_is_committed():
    germinate = Germinate(slot="a", blueprint="norm")
    replay = ReplayPolicy(
        [(3, germinate), (4, germinate)], last_epoch=9, patience_epochs=6, fade_steps=5
    )

    def decided(epoch: int, stage: SeedStage, committed: int = 0) -> list[Action]:
        there = slot("a", stage, committed=committed, max_committed=3)
        return [a for a in replay.decide(state(there, epoch=epoch)) if isinstance(a, Germinate)]

    assert decided(2, SeedStage.DORMANT) == []
    assert decided(3, SeedStage.DORMANT) == [germinate]
    assert decided(4, SeedStage.TRAINING) == []
    assert decided(5, SeedStage.EMBARGOED) == [], "pruned, and not free yet"
    assert decided(6, SeedStage.DORMANT) == [germinate], "again"
    assert decided(7, SeedStage.FOSSILIZED, committed=1) == [germinate], "the second"
    assert decided(8, SeedStage.FOSSILIZED, committed=2) == [], "both are there"


def test_nothing_is_replayed_too_late():
    plan = [(3, Germinate(slot="a", blueprint="norm"))]
    replay = ReplayPolicy(plan, last_epoch=4, patience_epochs=6, fade_steps=5)
    assert replay.decide(state(slot("a"), epoch=5)) == []
