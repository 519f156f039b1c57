"""UCB1 against hand-computed values and its closed form, and as what the heuristic chooses by."""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.experiments.config import load_run_config
from esper.experiments.run import prepare
from esper.experiments.settings import SettingsError
from esper.lifecycle import (
    BlueprintChoice,
    Commit,
    Germinate,
    GrowthState,
    Prune,
    SeedStage,
    SlotState,
    check_action,
)
from esper.policies import (
    UCB1,
    HeuristicConfig,
    HeuristicPolicy,
    UCB1Chooser,
    named_policy,
    regret_bound,
    ucb1_policy,
)
from esper.policies.chooser import commit_reward

REWARDS = st.floats(0.0, 1.0)


def bernoulli(means: Mapping[str, float], *, plays: int, random_seed: int) -> Iterator[UCB1]:
    """Play arms that pay 1 with their mean's probability and 0 otherwise, yielding after each."""
    luck = random.Random(random_seed)
    bandit = UCB1()
    for _ in range(plays):
        arm = bandit.rank(list(means))[0]
        bandit.update(arm, float(luck.random() < means[arm]))
        yield bandit


# The index and the books


def test_an_arm_is_ranked_by_its_mean_and_a_width_that_shrinks_with_its_plays():
    bandit = UCB1()
    for arm, reward in (("a", 1.0), ("a", 0.0), ("b", 0.4)):
        bandit.update(arm, reward)
    # sqrt(2 · ln 3 / 2) and sqrt(2 · ln 3 / 1), where ln 3 = 1.0986123.
    assert bandit.index("a") == pytest.approx(0.5 + 1.0481471)
    assert bandit.index("b") == pytest.approx(0.4 + 1.4823038)
    assert bandit.rank(["a", "b"]) == ["b", "a"]
    greedy = UCB1(exploration=0.0)
    greedy.load_state_dict(bandit.state_dict())
    assert greedy.index("a") == 0.5
    assert greedy.rank(["b", "a"]) == ["a", "b"]


def test_arms_never_played_come_first_and_equal_ones_in_the_order_given():
    bandit = UCB1()
    assert bandit.rank(["c", "a", "b"]) == ["c", "a", "b"]
    for arm in ("a", "b"):
        bandit.update(arm, 1.0)
    assert bandit.rank(["b", "d", "a", "c"]) == ["d", "c", "b", "a"]
    assert bandit.rank(["a", "b"]) == ["a", "b"]


def test_the_books_say_what_was_played_and_paid():
    bandit = UCB1()
    assert (bandit.plays, bandit.total, bandit.empirical_regret()) == (0, 0.0, 0.0)
    for arm, reward in (("a", 0.5), ("b", 0.25), ("a", 1.0)):
        bandit.update(arm, reward)
    kept = {arm: (known.plays, known.total, known.mean) for arm, known in bandit.arms.items()}
    assert kept == {"a": (2, 1.5, 0.75), "b": (1, 0.25, 0.25)}
    assert (bandit.plays, bandit.total) == (3, 1.75)
    assert bandit.empirical_regret() == 3 * 0.75 - 1.75
    assert bandit.pseudo_regret({"a": 0.5, "b": 0.25, "never": 1.0}) == 2 * 0.5 + 0.75


@pytest.mark.parametrize("reward", [-0.01, 1.01, math.nan, math.inf])
def test_a_reward_that_is_not_from_0_to_1_is_refused_and_not_noted(reward: float):
    bandit = UCB1()
    bandit.update("a", 1.0)
    with pytest.raises(ValueError, match=f"arm 'a' got the reward {reward}; UCB1 takes rewards"):
        bandit.update("a", reward)
    assert bandit.state_dict() == {"arms": {"a": {"plays": 1, "total": 1.0}}}


@pytest.mark.parametrize("exploration", [-1.0, math.nan, math.inf])
def test_an_exploration_that_makes_no_sense_is_refused(exploration: float):
    with pytest.raises(ValueError, match=f"at least 0, got {exploration}"):
        UCB1(exploration)


@pytest.mark.parametrize(
    "kept", [{"plays": 0, "total": 0.0}, {"plays": 1, "total": 1.5}, {"plays": 1}]
)
def test_books_that_cannot_be_are_refused(kept: dict[str, float]):
    bandit = UCB1()
    bandit.update("a", 1.0)
    with pytest.raises(ValueError, match="PlayedArm"):
        bandit.load_state_dict({"arms": {"b": kept}})
    assert list(bandit.arms) == ["a"]


@given(rewards=st.lists(REWARDS, min_size=6, max_size=40), late=st.integers(3, 5))
def test_every_arm_is_tried_and_one_that_comes_later_is_next(rewards: list[float], late: int):
    bandit = UCB1()
    played = []
    for turn, reward in enumerate(rewards):
        arms = ["a", "b", "c"] + ["late"] * (turn >= late)
        played.append(bandit.rank(arms)[0])
        bandit.update(played[-1], reward)
    assert played[:3] == ["a", "b", "c"]
    assert played[late] == "late"


def test_no_arm_is_given_up_for_good():
    bandit = UCB1()
    for _ in range(2000):
        arm = bandit.rank(["good", "bad"])[0]
        bandit.update(arm, float(arm == "good"))
    before = bandit.arms["bad"].plays
    while bandit.arms["bad"].plays == before:
        arm = bandit.rank(["good", "bad"])[0]
        bandit.update(arm, float(arm == "good"))
        assert bandit.plays < 10_000


@given(rewards=st.lists(REWARDS, max_size=40), cut=st.integers(0, 40))
def test_books_that_went_through_json_go_on_the_same(rewards: list[float], cut: int):
    twin, bandit = UCB1(), UCB1()
    for turn, reward in enumerate(rewards):
        if turn == cut:
            kept = json.loads(json.dumps(bandit.state_dict(), allow_nan=False))
            bandit = UCB1()
            bandit.load_state_dict(kept)
        ranked = bandit.rank(["a", "b", "c"])
        assert ranked == twin.rank(["a", "b", "c"])
        bandit.update(ranked[0], reward)
        twin.update(ranked[0], reward)
    assert bandit.state_dict() == twin.state_dict()


# Regret


def test_the_closed_form_by_hand():
    # One gap of 0.5: 8 · ln 100 / 0.5 + 4.2898681 · 0.5, where ln 100 = 4.6051702.
    assert regret_bound({"a": 0.9, "b": 0.4}, 100) == pytest.approx(73.682723 + 2.144934)
    # A second gap of 0.25 adds 8 · ln 100 / 0.25 + 4.2898681 · 0.25.
    three = {"a": 0.9, "b": 0.4, "c": 0.65}
    assert regret_bound(three, 100) == pytest.approx(75.827657 + 147.365446 + 1.072467)
    assert regret_bound(three, 1) == pytest.approx(4.2898681 * 0.75)
    assert regret_bound({"a": 0.5, "b": 0.5}, 100) == 0.0


def test_what_regret_cannot_be_told_of_is_refused():
    bandit = UCB1()
    bandit.update("a", 1.0)
    with pytest.raises(ValueError, match=r"arm 'a' was played, and its mean is not given.*: 'b'"):
        bandit.pseudo_regret({"b": 0.5})
    with pytest.raises(ValueError, match=r"mean reward of arm 'a' must be from 0 to 1, got 1\.5"):
        bandit.pseudo_regret({"a": 1.5})
    with pytest.raises(ValueError, match="mean reward of one arm at least, got none"):
        regret_bound({}, 1)
    with pytest.raises(ValueError, match="first play on, got 0 plays"):
        regret_bound({"a": 0.5}, 0)


@given(
    means=st.lists(REWARDS, min_size=3, max_size=3),
    played=st.lists(st.sampled_from("abc"), max_size=60),
)
def test_the_pseudo_regret_is_the_sum_of_what_each_play_missed(
    means: list[float], played: list[str]
):
    by_arm = dict(zip("abc", means, strict=True))
    bandit, missed = UCB1(), 0.0
    for arm in played:
        bandit.update(arm, 0.5)
        missed += max(means) - by_arm[arm]
    assert bandit.pseudo_regret(by_arm) == pytest.approx(missed)


@pytest.mark.parametrize("random_seed", range(3))
@pytest.mark.parametrize(
    "means",
    [
        {"a": 0.9, "b": 0.4},
        {"a": 0.3, "b": 0.5, "c": 0.7},
        {"a": 0.02, "b": 0.04, "c": 0.9, "d": 0.88},
    ],
)
def test_the_pseudo_regret_stays_below_the_closed_form_at_every_play(
    means: dict[str, float], random_seed: int
):
    for plays, bandit in enumerate(bernoulli(means, plays=1500, random_seed=random_seed), start=1):
        assert bandit.plays == plays
        assert bandit.pseudo_regret(means) <= regret_bound(means, plays)


def test_the_regret_grows_as_the_logarithm_of_the_plays_and_as_fast_as_the_index_says():
    """Where rewards do not vary, both indices stay equal, up to one play of the worse arm.

    With n and N plays of the worse and the better arm, n · (gap + sqrt(2 · ln t / N))² = 2 · ln t.
    """
    means, gap = {"good": 0.9, "bad": 0.4}, 0.5
    bandit, regrets = UCB1(), {}
    for plays in range(1, 4**7 + 1):
        arm = bandit.rank(list(means))[0]
        bandit.update(arm, means[arm])
        if plays in (4**4, 4**5, 4**6, 4**7):
            regrets[plays] = bandit.pseudo_regret(means)
            width = math.sqrt(2.0 * math.log(plays) / bandit.arms["good"].plays)
            expected = 2.0 * math.log(plays) / (gap + width) ** 2
            assert bandit.arms["bad"].plays == pytest.approx(expected, abs=1.5)
    steps = [later - earlier for earlier, later in itertools.pairwise(regrets.values())]
    assert all(step == pytest.approx(2.0 * math.log(4) / gap, rel=0.5) for step in steps)


# The chooser in the heuristic

CHOICES = tuple(
    BlueprintChoice(name=name, param_count=count)
    for name, count in (("norm", 16), ("conv", 60), ("attention", 90))
)
EAGER = HeuristicConfig(warmup_epochs=0, plateau_epochs=1, max_refusals=None)


class World:
    """A growing model by rule: each arm's seeds save what `worth` says, and None are pruned.

    A seed is on trial at the decision after it germinated. What is pruned leaves its slot free one
    decision later, and what is committed leaves it free at once.
    """

    def __init__(self, kinds: Mapping[str, tuple[str, int]], worth: Mapping[str, float]) -> None:
        self.worth = worth
        self.germinated: list[tuple[str, str]] = []
        self.epoch = 5
        self.slots = {
            path: SlotState(
                path=path,
                family=family,
                dim=dim,
                stage=SeedStage.DORMANT,
                choices=CHOICES,
                max_committed=1000,
            )
            for path, (family, dim) in kinds.items()
        }

    def change(self, path: str, stage: SeedStage, **changes: Any) -> None:
        self.slots[path] = self.slots[path].model_copy(update={"stage": stage, **changes})

    def state(self) -> GrowthState:
        losses = (1.0,) * self.epoch
        return GrowthState(
            epoch=self.epoch, step=self.epoch, losses=losses, slots=tuple(self.slots.values())
        )

    def decide(self, policy: HeuristicPolicy) -> None:
        """Let it decide once, carry that out, and let an epoch pass."""
        actions = policy.decide(self.state())
        for path, slot in self.slots.items():
            if slot.stage is SeedStage.EMBARGOED:
                self.change(path, SeedStage.DORMANT)
        for action in actions:
            if isinstance(action, Germinate):
                self.germinated.append((action.slot, action.blueprint))
                self._grow(action.slot, action.blueprint)
            elif isinstance(action, Commit):
                committed = self.slots[action.slot].committed + 1
                self.change(action.slot, SeedStage.FOSSILIZED, committed=committed)
            elif isinstance(action, Prune):
                self.change(action.slot, SeedStage.EMBARGOED)
        self.epoch += 1

    def _grow(self, path: str, blueprint: str) -> None:
        slot = self.slots[path]
        saves = self.worth.get(f"{slot.family} {slot.dim}: {blueprint}")
        refused = {"epochs_in_stage": 9, "refusals_in_stage": 9 * (saves is None)}
        self.change(
            path,
            SeedStage.PROBATIONARY,
            blueprint=blueprint,
            contribution_fraction=saves,
            **refused,
        )


def run(policy: HeuristicPolicy, world: World, decisions: int) -> list[tuple[str, str]]:
    for _ in range(decisions):
        world.decide(policy)
    return world.germinated


def bandit_of(policy: HeuristicPolicy) -> UCB1:
    assert isinstance(policy.chooser, UCB1Chooser)
    return policy.chooser.bandit


@pytest.mark.parametrize(
    ("fraction", "reward"),
    [
        (0.0, 0.5),
        (0.3, 0.65),
        (1.0, 1.0),
        (-0.4, 0.3),
        (-1.0, 0.0),
        # Not measured, or of a loss of 0.
        (None, 0.5),
        (math.nan, 0.5),
        # Of a loss that may be negative, and forced harm.
        (7.0, 1.0),
        (math.inf, 1.0),
        (-3.0, 0.0),
    ],
)
def test_a_commit_pays_half_and_half_of_what_it_saves(fraction: float | None, reward: float):
    assert commit_reward(fraction) == pytest.approx(reward)


def test_what_was_committed_goes_first_in_a_slot_of_the_same_kind_and_in_no_other():
    for other, expected in (
        (("cnn", 8), "conv"),
        (("cnn", 16), "norm"),
        (("transformer", 8), "norm"),
    ):
        world = World({"first": ("cnn", 8), "other": other}, {"cnn 8: conv": 0.4})
        world.change("other", SeedStage.EMBARGOED)
        policy = ucb1_policy(EAGER)
        while len(world.germinated) < 4:
            world.change("other", SeedStage.EMBARGOED)
            world.decide(policy)
        tried = ["norm", "conv", "attention", "conv"]
        assert world.germinated == [("first", blueprint) for blueprint in tried]
        world.decide(policy)
        world.change("first", SeedStage.TERMINATED)
        world.change("other", SeedStage.DORMANT)
        assert run(policy, world, 1)[4:] == [("other", expected)]


def test_the_books_hold_what_each_life_paid():
    world = World({"a": ("cnn", 8), "b": ("transformer", 32)}, {"transformer 32: norm": 0.3})
    policy = ucb1_policy(EAGER)
    run(policy, world, 13)
    assert len(world.germinated) == 7
    kept = {arm: (known.plays, known.mean) for arm, known in bandit_of(policy).arms.items()}
    assert kept == {
        "cnn 8: norm": (1, 0.0),
        "cnn 8: conv": (1, 0.0),
        "cnn 8: attention": (1, 0.0),
        "transformer 32: norm": (1, 0.65),
        "transformer 32: conv": (1, 0.0),
        "transformer 32: attention": (1, 0.0),
    }
    run(policy, world, 600)
    # Where a slot cools down only the other's arms are on offer, so that the best waits at times.
    plays = {arm: known.plays for arm, known in bandit_of(policy).arms.items()}
    best = plays.pop("transformer 32: norm")
    assert best > 5 * max(plays.values())
    assert min(plays.values()) > 1


def test_what_a_seed_saved_is_that_last_seen_before_the_commit_even_if_another_grows_by_now():
    policy = ucb1_policy(EAGER)
    world = World({"a": ("cnn", 8)}, {"cnn 8: norm": 0.2})
    run(policy, world, 1)
    world.change("a", SeedStage.PROBATIONARY, contribution_fraction=0.6)
    run(policy, world, 1)
    # A person germinates in the same slot before the next decision.
    world.change("a", SeedStage.TRAINING, contribution_fraction=-9.0, blueprint="conv")
    run(policy, world, 1)
    assert bandit_of(policy).arms["cnn 8: norm"].mean == 0.8


def test_a_seed_that_was_forced_in_before_it_was_seen_pays_for_the_commit_alone():
    policy = ucb1_policy(EAGER)
    world = World({"a": ("cnn", 8)}, {})
    run(policy, world, 1)
    world.change("a", SeedStage.FOSSILIZED, committed=1, contribution_fraction=None)
    run(policy, world, 1)
    assert bandit_of(policy).arms["cnn 8: norm"].mean == 0.5


def test_a_seed_that_somebody_else_germinated_is_no_play():
    policy = ucb1_policy(EAGER)
    world = World({"a": ("cnn", 8)}, {})
    world.change("a", SeedStage.TRAINING, blueprint="conv")
    run(policy, world, 1)
    world.change("a", SeedStage.FOSSILIZED, committed=1)
    run(policy, world, 1)
    assert bandit_of(policy).plays == 0


def test_several_seeds_at_once_are_of_different_arms_until_all_are_tried():
    config = EAGER.model_copy(update={"max_living": 3})
    world = World(dict.fromkeys("abc", ("cnn", 8)), {"cnn 8: conv": 0.3})
    policy = ucb1_policy(config)
    for _ in range(3):
        (germinate,) = (
            action for action in policy.decide(world.state()) if isinstance(action, Germinate)
        )
        world.germinated.append((germinate.slot, germinate.blueprint))
        world.change(germinate.slot, SeedStage.TRAINING)
    assert world.germinated == [("a", "norm"), ("b", "conv"), ("c", "attention")]


def test_a_paying_arm_goes_first_while_another_seed_of_it_lives():
    config = EAGER.model_copy(update={"max_living": 2})
    world = World({"a": ("cnn", 8)}, {"cnn 8: conv": 0.3})
    policy = ucb1_policy(config)
    while len(world.germinated) < 4:
        world.decide(policy)
    assert world.germinated[-1] == ("a", "conv")
    world.slots["b"] = world.slots["a"].model_copy(
        update={"path": "b", "stage": SeedStage.DORMANT, "committed": 0}
    )
    world.change("a", SeedStage.TRAINING)
    assert run(policy, world, 1)[4:] == [("b", "conv")]


def test_slots_of_one_kind_are_tried_evenly_with_an_arm():
    config = EAGER.model_copy(update={"blueprints": ("norm",)})
    for worth in ({}, {"cnn 8: norm": 0.1}):
        world = World(dict.fromkeys("abc", ("cnn", 8)), worth)
        assert "".join(path for path, _ in run(ucb1_policy(config), world, 11)) == "abcabc"


def test_a_pair_that_was_refused_too_often_is_left_alone_all_the_same():
    config = EAGER.model_copy(update={"blueprints": ("norm",), "max_refusals": 2})
    world = World({"a": ("cnn", 8)}, {})
    assert run(ucb1_policy(config), world, 20) == [("a", "norm")] * 2


def test_what_is_foreseen_is_what_comes_and_looking_ahead_changes_nothing():
    kinds = {"a": ("cnn", 8), "b": ("cnn", 8), "c": ("transformer", 8)}
    world = World(kinds, {"cnn 8: conv": 0.3, "transformer 8: norm": 0.6})
    policy = ucb1_policy(EAGER)
    foreseen = 0
    for _ in range(60):
        before = len(world.germinated)
        policy.decide(world.state().model_copy(update={"losses": ()}))  # takes note of what ended
        kept = json.dumps(policy.state_dict())
        upcoming = policy.upcoming(world.state())
        assert json.dumps(policy.state_dict()) == kept
        world.decide(policy)
        for path, blueprint in world.germinated[before:]:
            assert upcoming[0] == Germinate(slot=path, blueprint=blueprint)
            foreseen += 1
    assert foreseen > 20


@pytest.mark.parametrize("cut", range(12))
def test_a_policy_resumed_from_its_state_goes_on_as_if_it_had_not_stopped(cut: int):
    config = EAGER.model_copy(update={"max_living": 2})
    kinds = {"a": ("cnn", 8), "b": ("cnn", 8), "c": ("transformer", 8)}
    world, twin = (World(kinds, {"cnn 8: conv": 0.3, "transformer 8: norm": 0.1}) for _ in range(2))
    policy, going_on = ucb1_policy(config), ucb1_policy(config)
    run(policy, world, cut)
    kept = json.loads(json.dumps(policy.state_dict(), allow_nan=False))
    resumed = ucb1_policy(config)
    resumed.load_state_dict(kept)
    assert run(resumed, world, 60) == run(going_on, twin, cut + 60)
    assert resumed.state_dict() == going_on.state_dict()


@given(data=st.data(), max_living=st.integers(1, 3))
def test_whatever_the_state_the_policy_asks_only_for_what_is_legal(
    growth_states: st.SearchStrategy[GrowthState], data: st.DataObject, max_living: int
):
    policy = ucb1_policy(EAGER.model_copy(update={"max_living": max_living}))
    for _ in range(2):
        seen = data.draw(growth_states)
        for action in policy.decide(seen):
            check_action(seen, action)


# By its name


def test_the_policy_has_its_name_and_a_run_gives_it_the_settings_of_the_heuristic():
    assert named_policy("ucb1", random_seed=0).name == "ucb1"
    assert HeuristicPolicy().name == "heuristic"
    settings = ["heuristic.max_living=3", "heuristic.plateau_epochs=4"]
    config = load_run_config("digits", None, settings, {"policy": "ucb1"})
    policy = prepare(config).growth.policy
    assert isinstance(policy, HeuristicPolicy)
    assert isinstance(policy.chooser, UCB1Chooser)
    assert policy.name == "ucb1"
    assert policy.config == config.heuristic


def test_a_patience_shorter_than_a_trial_is_refused():
    with pytest.raises(SettingsError, match=r"heuristic\.patience_epochs is 2, and a trial takes"):
        load_run_config("digits", None, ["heuristic.patience_epochs=2"], {"policy": "ucb1"})
