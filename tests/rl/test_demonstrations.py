"""Imitating another policy: what it did is what is shown, and becomes what is done."""

import math
import signal
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.parts import chosen_policy
from esper.experiments.settings import SettingsError
from esper.experiments.worker_pool import WorkerDiedError
from esper.lifecycle import (
    Action,
    Advance,
    AlphaCurve,
    BlendOperator,
    Commit,
    Germinate,
    IllegalAction,
    Operation,
    SeedStage,
    SlotState,
    Wait,
)
from esper.lifecycle.actions import check_action
from esper.policies.learned import ActionChoices, LearnedPolicy, NetworkConfig, save_policy
from esper.rl import GrowthEnv, HostRun
from esper.rl import demonstrations as demonstrating
from esper.rl.demonstrations import (
    Demonstration,
    DemonstrationConfig,
    NotImitableError,
    _Turns,
    demonstrate,
    demonstrations,
    imitate,
)
from esper.rl.masked_policy import MaskedRecurrentPolicy
from esper.rl.policy_training import PolicyDivergedError
from rl_runs import TinyRuns, make_env

EPOCHS = 12
SHOWN = DemonstrationConfig(num_episodes=3, passes=150, learning_rate=5e-3)
GAMMA = 0.5


def teaching(**settings: Any) -> RunConfig:
    """A heuristic that grows the tiny host at once; its slots ramp otherwise than the task's."""
    heuristic = {"blueprints": ["mlp", "norm"], "warmup_epochs": 1, "patience_epochs": 4}
    plain = {"heuristic": heuristic, "slot": {"ramp_steps": 20, "thresholds": {"trial_epochs": 2}}}
    return load_run_config("digits", None, [], {**plain, **settings})


def shown_by_heuristic(env: GrowthEnv, num_episodes: int = 1) -> list[Demonstration]:
    return [demonstrate(SHOWN, teaching(), env, seed) for seed in range(num_episodes)]


def test_what_is_shown_is_what_the_policy_does_and_plays_again_to_the_bit() -> None:
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    (shown,) = shown_by_heuristic(env)
    assert shown.actions.shape == (EPOCHS, 6)
    run = teaching(random_seed=0)
    policy = chosen_policy(run)
    operations = []
    left: list[Action] = []
    observation, _ = env.reset(seed=0)
    for place, numbers in enumerate(shown.actions):
        for name, values in observation.items():
            assert np.array_equal(values, shown.observations[name][place]), name
        state, taken = env.state, env.coder.decode(numbers, env.state)
        asked = [action for action in (*policy.decide(state), *left) if _is_legal(state, action)]
        left = [action for action in asked if isinstance(action, Germinate)]
        if isinstance(taken, Advance):
            assert (taken.ramp_steps, taken.ramp_curve) == (20, run.slot.ramp_curve)
            taken = Advance(slot=taken.slot)
        assert env.coder.encode(taken) in [env.coder.encode(one) for one in asked or [Wait()]]
        operations.append(taken.operation)
        observation, reward, *_ = env.step(numbers)
        assert np.float32(reward) == shown.rewards[place]
    assert {Operation.GERMINATE, Operation.ADVANCE, Operation.WAIT} <= set(operations)


def _is_legal(state: Any, action: Any) -> bool:
    try:
        check_action(state, action)
    except IllegalAction:
        return False
    return True


def test_a_policys_own_choices_follow_the_seed_too() -> None:
    env = GrowthEnv(TinyRuns(epochs=2))
    config = DemonstrationConfig(policy="random")
    shown = [demonstrate(config, teaching(), env, seed) for seed in (0, 3, 5, 0)]  # no noop
    assert len({tuple(episode.actions[0]) for episode in shown}) > 1
    assert np.array_equal(shown[0].actions, shown[-1].actions)


def test_slots_take_turns_where_a_policy_asks_for_more_than_one_action() -> None:
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    env.reset(seed=0)
    second, first = (Germinate(slot=slot, blueprint="mlp") for slot in ("second", "first"))
    turns = _Turns()

    def chosen(*asked: Action) -> Action:
        return turns.choose(asked, env.state)

    assert chosen(Commit(slot="first")) == Wait(), "not legal"
    assert [chosen(second, first) for _ in range(3)] == [second, first, second]
    assert chosen() == first, "a germination that had no turn is kept"
    assert [chosen(), chosen(Wait())] == [Wait(), Wait()], "until it had one"
    assert chosen(Commit(slot="second"), first, second) == second, "the longest wait, if legal"


def test_what_had_no_turn_waits_until_it_has_one_or_its_slot_takes_no_seed() -> None:
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    env.reset(seed=0)
    slot = env.state.slots[0]
    empty, taken = (
        [slot.model_copy(update={"path": path, "stage": stage}) for path in "abcde"]
        for stage in (SeedStage.DORMANT, SeedStage.GERMINATED)
    )
    several = [Germinate(slot=path, blueprint="mlp") for path in "abcde"]
    turns = _Turns()

    def chosen(slots: Sequence[SlotState], *asked: Action) -> Action:
        return turns.choose(asked, env.state.model_copy(update={"slots": tuple(slots)}))

    assert [chosen(empty, *several), chosen(empty), chosen(empty)] == several[:3]
    other = Germinate(slot="e", blueprint="norm")
    assert chosen(empty, other) == several[3], "the oldest first"
    assert chosen(empty) == other, "in place of what was asked for before"
    turns = _Turns()
    assert chosen(empty, *several[:2]) == several[0]
    assert chosen(taken) == chosen(empty) == Wait(), "b has taken another seed"


@pytest.mark.parametrize(
    ("ramp", "told"),
    [
        ({"ramp_steps": 30}, "ramp steps 30 is none of the head's choices: 0, 20, 50"),
        ({"ramp_curve": "linear"}, "ramp curve linear is none of the head's choices: cosine"),
    ],
)
def test_what_no_head_offers_cannot_be_imitated_unless_it_is_offered_too(
    ramp: dict[str, Any], told: str
) -> None:
    run = teaching(slot={"ramp_steps": 20, **ramp})
    narrow = ActionChoices(ramp_curves=(AlphaCurve.COSINE,))
    env = GrowthEnv(TinyRuns(epochs=EPOCHS), choices=narrow)
    with pytest.raises(ValueError, match=told) as caught:
        demonstrate(SHOWN, run, env, 0)
    assert "heuristic cannot be imitated, it asks for Advance(" in str(caught.value)
    assert "actions.ramp_steps" in str(caught.value)
    run = teaching(slot={"ramp_steps": 20, "blend_operator": "gate"})
    added = ActionChoices(blend_operators=(BlendOperator.ADD,))
    with pytest.raises(ValueError, match="blend operator gate is none of the head's choices: add"):
        demonstrate(SHOWN, run, GrowthEnv(TinyRuns(epochs=EPOCHS), choices=added), 0)
    run = teaching(slot={"ramp_steps": 20, **ramp})
    wide = ActionChoices(ramp_steps=(0, 20, 30))
    env = GrowthEnv(TinyRuns(epochs=EPOCHS), choices=wide)
    shown = demonstrate(SHOWN, run, env, 0)
    ramp_chosen = (
        wide.ramp_steps.index(run.slot.ramp_steps),
        wide.ramp_curves.index(run.slot.ramp_curve),
    )
    assert ramp_chosen in {tuple(pair) for pair in shown.actions[:, 4:].tolist()}


def learner(env: GrowthEnv) -> MaskedRecurrentPolicy:
    torch.manual_seed(0)
    return MaskedRecurrentPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 0.0,
        blueprints=env.coder.blueprints,
        choices=env.coder.choices,
        network=NetworkConfig(width=16, num_attention_heads=2),
    )


def test_what_is_imitated_becomes_what_the_policy_does(tmp_path: Path) -> None:
    """To the last action, in the environment: one step aside would lead to states never shown."""
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    shown = shown_by_heuristic(env, SHOWN.num_episodes)
    policy = learner(env)
    likelihoods = list(imitate(policy, shown, SHOWN, gamma=GAMMA))
    assert len(likelihoods) == SHOWN.passes
    assert likelihoods[0] < -1.0 < -0.1 < likelihoods[-1] <= 0.0
    save_policy(tmp_path / "policy.safetensors", policy.actor())
    for seed, episode in enumerate(shown):
        learned = LearnedPolicy.load(tmp_path / "policy.safetensors")
        env.reset(seed=seed)
        for numbers in episode.actions:
            (action,) = learned.decide(env.state)
            assert env.coder.encode(action) == numbers.tolist()
            env.step(numbers)


def test_the_value_becomes_what_was_earned_from_there_on_discounted() -> None:
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    shown = shown_by_heuristic(env, 2)
    policy = learner(env)
    for _ in imitate(policy, shown, SHOWN, gamma=GAMMA):
        pass
    for episode in shown:
        earned = [
            sum(GAMMA**later * reward for later, reward in enumerate(episode.rewards[place:]))
            for place in range(EPOCHS)
        ]
        found = _values(policy, episode)
        assert np.abs(found - earned).mean() < 0.25 * np.std(earned)


def _values(policy: MaskedRecurrentPolicy, episode: Demonstration) -> np.ndarray:
    zeros = torch.zeros(1, 1, policy.lstm_actor.hidden_size)
    observations = {
        name: torch.as_tensor(values).float() for name, values in episode.observations.items()
    }
    begins = torch.zeros(len(episode.actions))
    states = RNNStates((zeros, zeros), (zeros, zeros))
    with torch.no_grad():
        values, _, _ = policy.evaluate_actions(
            observations, torch.as_tensor(episode.actions), states, begins
        )
    return values.flatten().numpy()


def test_an_episode_that_ended_early_or_badly_or_went_back_is_no_example() -> None:
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    (whole,) = shown_by_heuristic(env)
    short = Demonstration(
        observations={name: values[:3] for name, values in whole.observations.items()},
        actions=np.zeros_like(whole.actions[:3]),
        rewards=np.full(3, -10.0, dtype=np.float32),
        num_planned=EPOCHS,
        diverged=True,
    )
    went_back = GrowthEnv(TinyRuns(epochs=EPOCHS, bad_losses=range(9, 12)))
    (long,) = shown_by_heuristic(went_back)
    diverging = GrowthEnv(
        lambda seed: replace(TinyRuns(epochs=EPOCHS)(seed), final=lambda: math.nan)
    )
    (bad,) = shown_by_heuristic(diverging)
    assert len(bad.actions) == EPOCHS, "it has diverged after its last decision"
    assert [one.is_whole for one in (whole, short, long, bad)] == [True, False, False, False]
    config = DemonstrationConfig(passes=2)
    found = [
        list(imitate(learner(env), shown, config, gamma=GAMMA))
        for shown in ([whole], [short, whole], [whole, long, bad])
    ]
    assert found[0] == found[1] == found[2]
    why = "of its 2 runs came to its end with the 12 decisions that were planned, they had 3, 14: "
    with pytest.raises(NotImitableError, match=why):
        next(imitate(learner(env), [long, short], config, gamma=GAMMA))


def test_runs_that_diverge_at_once_show_nothing_unless_all_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demonstrating, "worker_pool", lambda _: ThreadPoolExecutor(1))

    def shown(diverging: Container[int]) -> list[Demonstration]:
        def make_run(seed: int) -> HostRun:
            return TinyRuns(bad_losses=range(1, 99) if seed in diverging else ())(seed)

        config = DemonstrationConfig(num_episodes=3)
        return demonstrations(config, teaching(), lambda: GrowthEnv(make_run), processes=2)

    every, some = shown(()), shown({1})
    for one, other in zip((every[0], every[2]), some, strict=True):
        assert np.array_equal(one.rewards, other.rewards)
    with pytest.raises(NotImitableError, match="all of its 3 runs diverged before their first"):
        shown(range(3))


def test_a_policy_that_diverges_in_imitating_is_told_to_learn_slower() -> None:
    env = GrowthEnv(TinyRuns(epochs=EPOCHS))
    config = DemonstrationConfig(learning_rate=1e20)
    told = r"not finite after pass 2 of imitating heuristic; .* demonstrations\.learning_rate below"
    with pytest.raises(PolicyDivergedError, match=told):
        list(imitate(learner(env), shown_by_heuristic(env), config, gamma=GAMMA))


def test_processes_show_the_same_in_the_order_of_the_seeds() -> None:
    config = DemonstrationConfig(num_episodes=3)
    shown = demonstrations(config, teaching(), make_env, processes=2)
    alone = [demonstrate(config, teaching(), make_env(), place) for place in range(3)]
    for one, other in zip(shown, alone, strict=True):
        assert np.array_equal(one.actions, other.actions)
        assert np.allclose(one.rewards, other.rewards, rtol=1e-5, atol=1e-6)
    assert len({episode.rewards.tobytes() for episode in alone}) == 3


def test_a_killed_process_is_told_and_an_unknown_policy_starts_none() -> None:
    killed = partial(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="let heuristic play was killed"):
        demonstrations(DemonstrationConfig(), teaching(), killed, processes=1)
    with pytest.raises(SettingsError, match="no policy 'nonesuch'"):
        demonstrations(DemonstrationConfig(policy="nonesuch"), teaching(), killed, processes=1)
