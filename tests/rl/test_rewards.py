"""Rewards: shaping keeps the optimum of an exact MDP, no known game pays, each part is told apart.

Values are compared to 1e-9: a sum telescopes exactly in real numbers, and to rounding in floats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.lifecycle import Operation
from esper.rl.rewards import (
    Episode,
    Potential,
    Reward,
    RewardConfig,
    Standing,
    potential,
    step_reward,
    terminal_reward,
)

WAIT, GERMINATE, PRUNE, COMMIT = (
    Operation.WAIT,
    Operation.GERMINATE,
    Operation.PRUNE,
    Operation.COMMIT,
)
CHOICES = (WAIT, GERMINATE, PRUNE, COMMIT)
WITHOUT_COMMIT = [operation for operation in Operation if operation is not COMMIT]
HOST_PARAMS = 100

losses = st.floats(0.05, 20.0)
contributions = st.floats(-1.0, 1.0)
discounts = st.floats(0.5, 1.0)
measures = st.sampled_from([Potential.LOSS, Potential.CONTRIBUTION])
reward_configs = st.builds(
    RewardConfig,
    gamma=discounts,
    potential=st.sampled_from(Potential),
    progress=st.floats(0.0, 10.0),
    compute_rent=st.floats(0.0, 1.0),
)


class Slot(Enum):
    EMPTY = 0
    SEED = 1
    COMMITTED = 2


def after(slot: Slot, operation: Operation) -> Slot:
    """What becomes of a slot; what is not legal has no effect."""
    outcomes = {
        (Slot.EMPTY, GERMINATE): Slot.SEED,
        (Slot.SEED, PRUNE): Slot.EMPTY,
        (Slot.SEED, COMMIT): Slot.COMMITTED,
    }
    return outcomes.get((slot, operation), slot)


# ---- An exact MDP: growth in caricature, three decisions, a gate and a noisy measurement ----

State = tuple[int, Slot, bool]
"""Decision, slot, and whether the measurement was lucky."""
DECISIONS = 3
SHORT = Episode(num_decisions=DECISIONS, host_param_count=HOST_PARAMS, reference_loss=1.0)
STATES: list[State] = [
    (time, slot, lucky) for time in range(DECISIONS) for slot in Slot for lucky in (False, True)
]
Values = dict[tuple[State, Operation], float]
Bonus = Callable[["Growth", State, State | None], float]


@dataclass(frozen=True)
class Growth:
    standings: Mapping[State, Standing]
    final_losses: Mapping[Slot, float]
    gate_passes: float = 0.7
    luck: float = 0.3
    episode: Episode = SHORT

    def end(self, slot: Slot) -> Standing:
        return self.standings[DECISIONS - 1, slot, True].model_copy(
            update={"held_out_loss": math.nan, "contribution_fractions": (math.nan,)}
        )

    def outcomes(self, slot: Slot, operation: Operation) -> list[tuple[float, Slot]]:
        if operation is COMMIT:
            return [(self.gate_passes, after(slot, COMMIT)), (1.0 - self.gate_passes, slot)]
        return [(1.0, after(slot, operation))]


def standing(slot: Slot, loss: float, contribution: float) -> Standing:
    grown = slot is not Slot.EMPTY
    return Standing(
        held_out_loss=loss,
        contribution_fractions=(contribution,) if grown else (),
        param_count=HOST_PARAMS + 30 * grown,
    )


@st.composite
def growths(draw: st.DrawFn) -> Growth:
    return Growth(
        standings={
            state: standing(state[1], draw(losses), draw(contributions)) for state in STATES
        },
        final_losses={slot: draw(losses) for slot in Slot},
    )


def no_bonus(growth: Growth, state: State, successor: State | None) -> float:
    return 0.0


def action_values(growth: Growth, config: RewardConfig, bonus: Bonus = no_bonus) -> Values:
    """Value iteration backwards from the end; exact, since the horizon is finite."""
    values: Values = {}
    for state in reversed(STATES):
        for operation in CHOICES:
            values[state, operation] = sum(
                chance * _backed_up(growth, config, bonus, state, operation, slot, values)
                for chance, slot in growth.outcomes(state[1], operation)
            )
    return values


def _backed_up(
    growth: Growth,
    config: RewardConfig,
    bonus: Bonus,
    state: State,
    operation: Operation,
    slot: Slot,
    values: Values,
) -> float:
    time, before, episode = state[0], growth.standings[state], growth.episode
    if time == DECISIONS - 1:
        end, loss = growth.end(slot), growth.final_losses[slot]
        reward = terminal_reward(config, episode, before, [operation], end, final_loss=loss)
        return reward.total + bonus(growth, state, None)
    value = 0.0
    for chance, lucky in ((growth.luck, True), (1.0 - growth.luck, False)):
        successor = (time + 1, slot, lucky)
        reward = step_reward(config, episode, before, [operation], growth.standings[successor])
        later = config.gamma * max(values[successor, choice] for choice in CHOICES)
        value += chance * (reward.total + bonus(growth, state, successor) + later)
    return value


def changed_optima(plain: Values, other: Values) -> list[State]:
    """States in which what is best by `other` is not best by `plain`."""
    return [
        state
        for state in STATES
        if plain[state, max(CHOICES, key=lambda choice: other[state, choice])]
        < max(plain[state, choice] for choice in CHOICES) - 1e-9
    ]


@given(growths(), measures, st.floats(0.0, 10.0), discounts)
def test_shaping_takes_the_potential_off_every_value_and_keeps_every_optimal_action(
    growth: Growth, measure: Potential, weight: float, gamma: float
) -> None:
    shaped = RewardConfig(potential=measure, progress=weight, gamma=gamma)
    plain = shaped.model_copy(update={"potential": Potential.NONE})
    with_shaping, without = action_values(growth, shaped), action_values(growth, plain)
    for state, operation in without:
        phi = potential(shaped, growth.episode, growth.standings[state])
        expected = without[state, operation] - phi
        assert with_shaping[state, operation] == pytest.approx(expected, abs=1e-9)
    assert not changed_optima(without, with_shaping)


def contribution_each_step(growth: Growth, state: State, successor: State | None) -> float:
    return math.fsum(growth.standings[state].contribution_fractions)


def improvements_alone(growth: Growth, state: State, successor: State | None) -> float:
    gain = contribution_each_step(growth, successor, None) if successor else 0.0
    return max(0.0, gain - contribution_each_step(growth, state, None))


def potential_of_the_end(growth: Growth, state: State, successor: State | None) -> float:
    return 0.0 if successor else contribution_each_step(growth, state, None)


@pytest.mark.parametrize(
    "bonus", [contribution_each_step, improvements_alone, potential_of_the_end]
)
def test_a_bonus_that_is_no_potential_difference_changes_what_is_best(bonus: Bonus) -> None:
    useless = Growth(
        standings={state: standing(state[1], 1.0, 0.4 + 0.4 * state[2]) for state in STATES},
        final_losses=dict.fromkeys(Slot, 1.0),
    )
    shaped = RewardConfig(potential=Potential.CONTRIBUTION)
    plain = action_values(useless, RewardConfig(potential=Potential.NONE))
    assert not changed_optima(plain, action_values(useless, shaped))
    empty = [state for state in STATES if state[1] is Slot.EMPTY]
    assert all(plain[state, WAIT] > plain[state, GERMINATE] for state in empty)
    paid_for = action_values(useless, shaped, bonus)
    assert any(paid_for[state, GERMINATE] > paid_for[state, WAIT] for state in empty)
    assert changed_optima(plain, paid_for)


@given(growths(), measures, discounts)
def test_to_an_optimal_agent_a_lucky_measurement_is_worth_nothing(
    growth: Growth, measure: Potential, gamma: float
) -> None:
    config = RewardConfig(potential=measure, gamma=gamma)
    values = action_values(growth, config)

    def worth(state: State) -> float:
        phi = potential(config, growth.episode, growth.standings[state])
        return phi + max(values[state, operation] for operation in CHOICES)

    for time, slot, _ in STATES:
        assert worth((time, slot, True)) == pytest.approx(worth((time, slot, False)), abs=1e-9)


# ---- Games that must not pay: whole episodes, whatever is measured on the way ----


@dataclass(frozen=True)
class Noise:
    """What is measured on the way, one more than decisions; the first is before any action."""

    losses: Sequence[float]
    contributions: Sequence[float]


@st.composite
def noises(draw: st.DrawFn, num_decisions: int) -> Noise:
    size = num_decisions + 1
    return Noise(
        losses=[1.0, *draw(st.lists(losses, min_size=size - 1, max_size=size - 1))],
        contributions=draw(st.lists(contributions, min_size=size, max_size=size)),
    )


def play(
    config: RewardConfig,
    operations: Sequence[Operation],
    noise: Noise,
    *,
    final_loss: float,
    seed_params: int = 20,
    num_decisions: int | None = None,
) -> list[Reward]:
    """The rewards of an episode with one slot, of which the agent may ask what is illegal, too."""
    episode = Episode(
        num_decisions=num_decisions or len(operations),
        host_param_count=HOST_PARAMS,
        reference_loss=noise.losses[0],
    )
    slot, standings = Slot.EMPTY, []
    for time, loss in enumerate(noise.losses[: len(operations) + 1]):
        grown = slot is not Slot.EMPTY
        standings.append(
            Standing(
                held_out_loss=loss,
                contribution_fractions=(noise.contributions[time],) if grown else (),
                param_count=HOST_PARAMS + seed_params * grown,
                flops=1e9 + 1e7 * seed_params * grown,
                host_flops=1e9,
            )
        )
        if time < len(operations):
            slot = after(slot, operations[time])
    asked = [[operation] for operation in operations]
    steps = list(zip(standings, asked, standings[1:], strict=False))
    rewards = [step_reward(config, episode, *step) for step in steps[:-1]]
    return [*rewards, terminal_reward(config, episode, *steps[-1], final_loss=final_loss)]


def discounted(config: RewardConfig, rewards: Sequence[Reward]) -> float:
    return math.fsum(config.gamma**time * reward.total for time, reward in enumerate(rewards))


def waiting(config: RewardConfig, num_decisions: int, *, final_loss: float) -> float:
    quiet = Noise(losses=[1.0] * (num_decisions + 1), contributions=[0.0] * (num_decisions + 1))
    return discounted(config, play(config, [WAIT] * num_decisions, quiet, final_loss=final_loss))


@st.composite
def churning(draw: st.DrawFn) -> list[Operation]:
    """Germinate and prune by turns, with pauses."""
    rounds = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5))
    return [
        operation
        for pause, life in rounds
        for operation in [*[WAIT] * pause, GERMINATE, *[WAIT] * life, PRUNE]
    ]


@st.composite
def parking(draw: st.DrawFn) -> list[Operation]:
    """Germinate, and do nothing more."""
    return [WAIT] * draw(st.integers(0, 8)) + [GERMINATE] + [WAIT] * draw(st.integers(0, 8))


def anything_with(operations: Sequence[Operation]) -> st.SearchStrategy[list[Operation]]:
    """Anything at all of these, illegal things too, but not nothing."""
    some = st.lists(st.sampled_from(operations), min_size=1, max_size=12)
    return some.filter(lambda chosen: set(chosen) != {WAIT})


@pytest.mark.parametrize(
    "game",
    [churning(), parking(), anything_with(WITHOUT_COMMIT), anything_with(list(Operation))],
    ids=["churn", "parking", "anything without a commit", "committing what is useless"],
)
@given(data=st.data())
def test_what_leaves_the_final_loss_as_it_is_gives_less_than_waiting(
    game: st.SearchStrategy[list[Operation]], data: st.DataObject
) -> None:
    operations, config, final_loss = data.draw(game), data.draw(reward_configs), data.draw(losses)
    rewards = play(
        config,
        operations,
        data.draw(noises(len(operations))),
        final_loss=final_loss,
        seed_params=data.draw(st.integers(0, 500)),
    )
    interventions = [
        config.gamma**time * config.intervention
        for time, operation in enumerate(operations)
        if operation is not WAIT
    ]
    idle = waiting(config, len(operations), final_loss=final_loss)
    assert discounted(config, rewards) <= idle - math.fsum(interventions) + 1e-9
    assert discounted(config, rewards) < idle


@given(data=st.data())
def test_committing_at_a_lucky_peak_gives_what_the_same_commit_without_luck_does(
    data: st.DataObject,
) -> None:
    config, num_decisions = data.draw(reward_configs), data.draw(st.integers(3, 10))
    noise = data.draw(noises(num_decisions))
    peak = min(range(1, num_decisions), key=noise.losses.__getitem__)
    operations = [WAIT] * num_decisions
    operations[0], operations[peak] = GERMINATE, COMMIT
    final_loss = data.draw(losses)
    lucky = play(config, operations, noise, final_loss=final_loss)
    sober = play(config, operations, data.draw(noises(num_decisions)), final_loss=final_loss)
    assert discounted(config, lucky) == pytest.approx(discounted(config, sober), abs=1e-9)
    shaped_away = [reward.model_copy(update={"progress": 0.0}) for reward in lucky]
    assert discounted(config, shaped_away) == pytest.approx(discounted(config, lucky), abs=1e-9)


@given(data=st.data())
def test_a_useful_seed_that_is_committed_pays(data: st.DataObject) -> None:
    config = RewardConfig(potential=data.draw(st.sampled_from(Potential)))
    saved_fraction = data.draw(st.floats(0.05, 0.5))
    host_loss = data.draw(losses)
    life = [GERMINATE, Operation.ADVANCE, Operation.ADVANCE, Operation.ADVANCE, COMMIT]
    operations = (
        [WAIT] * data.draw(st.integers(0, 8)) + life + [WAIT] * data.draw(st.integers(0, 8))
    )
    rewards = play(
        config,
        operations,
        data.draw(noises(len(operations))),
        final_loss=host_loss * (1.0 - saved_fraction),
        seed_params=data.draw(st.integers(0, 50)),
    )
    assert discounted(config, rewards) > waiting(config, len(operations), final_loss=host_loss)


@given(data=st.data())
def test_diverging_is_no_way_out(data: st.DataObject) -> None:
    """However bad the run and however big the network: ending early saves rent, and costs more."""
    config, num_decisions = RewardConfig(), 12
    noise, params = data.draw(noises(num_decisions)), data.draw(st.integers(0, 50 * HOST_PARAMS))
    operations = [GERMINATE] + [WAIT] * (num_decisions - 1)
    length = data.draw(st.integers(1, num_decisions))
    gone = play(
        config,
        operations[:length],
        noise,
        final_loss=data.draw(st.sampled_from([math.nan, math.inf])),
        seed_params=params,
        num_decisions=num_decisions,
    )
    stayed = play(config, operations, noise, final_loss=data.draw(losses), seed_params=params)
    assert discounted(config, gone) < discounted(config, stayed)


# ---- The components ----

EPISODE = Episode(num_decisions=4, host_param_count=1000, reference_loss=2.0)
BEFORE = Standing(held_out_loss=1.6, contribution_fractions=(0.1, -0.02), param_count=1000)
AFTER = Standing(
    held_out_loss=1.25,
    contribution_fractions=(0.2, 0.05),
    param_count=1500,
    flops=3e9,
    host_flops=2e9,
)
ALL = RewardConfig(
    gamma=0.9,
    progress=2.0,
    parameter_rent=0.4,
    compute_rent=0.8,
    intervention=0.01,
    terminal=3.0,
    diverged=7.0,
)
RENTS = {"parameter_rent": -0.4 * 0.5 / 4, "compute_rent": -0.8 * 0.5 / 4}


def close(expected: Mapping[str, float]) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_each_component_is_what_its_formula_says() -> None:
    none = {"terminal": 0.0, "diverged": 0.0}
    by_loss = 0.9 * 2.0 * math.log(2.0 / 1.25) - 2.0 * math.log(2.0 / 1.6)
    step = step_reward(ALL, EPISODE, BEFORE, [GERMINATE], AFTER)
    assert step.components == close({"progress": by_loss, **RENTS, "intervention": -0.01, **none})
    contributing = ALL.model_copy(update={"potential": Potential.CONTRIBUTION})
    by_contribution = 0.9 * 2.0 * 0.25 - 2.0 * 0.08
    step = step_reward(contributing, EPISODE, BEFORE, [WAIT], AFTER)
    assert step.components == close(
        {"progress": by_contribution, **RENTS, "intervention": 0.0, **none}
    )
    last = terminal_reward(ALL, EPISODE, BEFORE, [COMMIT], AFTER, final_loss=1.0)
    assert last.components == close(
        {
            "progress": -2.0 * math.log(2.0 / 1.6),
            **RENTS,
            "intervention": -0.01,
            "terminal": 3.0 * math.log(2.0),
            "diverged": 0.0,
        }
    )


@given(reward_configs, st.sampled_from(Operation), losses | st.just(math.nan))
def test_the_components_add_up_to_the_total_and_survive_an_event(
    config: RewardConfig, operation: Operation, final_loss: float
) -> None:
    reward = terminal_reward(config, EPISODE, BEFORE, [operation], AFTER, final_loss=final_loss)
    assert reward.total == math.fsum(reward.components.values())
    assert list(reward.components) == list(Reward.model_fields)
    assert Reward.from_dump(reward.model_dump(mode="json")) == reward


@pytest.mark.parametrize("operation", [op for op in Operation if op is not WAIT])
def test_every_operation_but_wait_costs_the_same(operation: Operation) -> None:
    config = RewardConfig()
    asked = step_reward(config, EPISODE, BEFORE, [operation], AFTER)
    idle = step_reward(config, EPISODE, BEFORE, [WAIT], AFTER)
    assert idle.total - asked.total == pytest.approx(config.intervention)


@pytest.mark.parametrize("name", Reward.model_fields)
def test_a_weight_of_zero_switches_its_component_off_and_no_other(name: str) -> None:
    final_loss = math.nan if name == "diverged" else 1.0
    whole = terminal_reward(ALL, EPISODE, BEFORE, [PRUNE], AFTER, final_loss=final_loss)
    off = ALL.model_copy(update={name: 0.0})
    rest = terminal_reward(off, EPISODE, BEFORE, [PRUNE], AFTER, final_loss=final_loss)
    assert whole.components[name] != 0.0
    assert rest.components == {**whole.components, name: 0.0}


@pytest.mark.parametrize("final_loss", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverged_is_penalised_whatever_was_measured_at_its_end(
    final_loss: float,
) -> None:
    broken = AFTER.model_copy(update={"held_out_loss": math.nan})
    reward = terminal_reward(ALL, EPISODE, BEFORE, [WAIT], broken, final_loss=final_loss)
    assert (reward.terminal, reward.diverged) == (0.0, -7.0)
    assert math.isfinite(reward.total)


LOSS, CONTRIBUTION = Potential.LOSS, Potential.CONTRIBUTION


@pytest.mark.parametrize(
    ("measure", "changes", "message"),
    [
        (LOSS, {"held_out_loss": math.nan}, "progress: held_out_loss must be finite, got nan"),
        (LOSS, {"held_out_loss": math.inf}, "progress: held_out_loss must be finite, got inf"),
        (LOSS, {"held_out_loss": 0.0}, "progress: held_out_loss must be above 0, got 0.0"),
        (
            CONTRIBUTION,
            {"contribution_fractions": (0.1, math.nan)},
            "progress: a contribution fraction must be finite, got nan",
        ),
        (LOSS, {"flops": math.inf}, "compute_rent: flops must be finite, got inf"),
        (LOSS, {"host_flops": 0.0}, "compute_rent: host_flops must be above 0, got 0.0"),
        (LOSS, {"flops": None}, "compute_rent: operations were not counted, got flops None"),
        (LOSS, {"host_flops": None}, "compute_rent: operations were not counted"),
    ],
)
def test_a_bad_measurement_is_refused_with_its_component_and_value(
    measure: Potential, changes: dict[str, Any], message: str
) -> None:
    config = ALL.model_copy(update={"potential": measure})
    bad = Standing(**{**AFTER.model_dump(), **changes})
    with pytest.raises(ValueError, match=message):
        step_reward(config, EPISODE, BEFORE, [WAIT], bad)


def test_a_bad_loss_at_either_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"terminal: final_loss must be above 0, got -1\.0"):
        terminal_reward(ALL, EPISODE, BEFORE, [WAIT], AFTER, final_loss=-1.0)
    nowhere = EPISODE.model_copy(update={"reference_loss": math.nan})
    with pytest.raises(ValueError, match="progress: reference_loss must be finite, got nan"):
        step_reward(ALL, nowhere, BEFORE, [WAIT], AFTER)


@pytest.mark.parametrize(
    "settings", [{"gamma": 0.0}, {"gamma": 1.01}, {"terminal": -1.0}, {"intervention": math.nan}]
)
def test_a_weight_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        RewardConfig(**settings)
