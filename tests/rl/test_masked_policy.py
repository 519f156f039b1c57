"""The growth network inside the library's recurrent PPO: legal, remembering, and exported as it is.

Log-probabilities of collecting and of learning are compared to 1e-5: single precision, and torch
computes attention in another way where gradients are wanted.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from cued_growth import (
    BEST_MEMORYLESS_RETURN,
    BEST_RETURN,
    BLUEPRINTS,
    EPISODE_STEPS,
    NUM_FEATURES,
    NUM_SLOTS,
    SIZES,
    CuedGrowth,
)
from esper.lifecycle import BlueprintChoice, GrowthState, SeedStage, SlotState
from esper.policies.learned import (
    ActionCoder,
    Head,
    HeadLogits,
    LearnedPolicy,
    NetworkConfig,
    features,
    save_policy,
    split_features,
)
from esper.rl.masked_policy import MaskedRecurrentPolicy
from rl_runs import make_env

SMALL = NetworkConfig(width=8, num_attention_heads=2)


def vectorised(num_envs: int = 4) -> VecEnv:
    return DummyVecEnv([CuedGrowth] * num_envs)


def learner(env: VecEnv | None = None, **settings: Any) -> RecurrentPPO:
    options = {"blueprints": BLUEPRINTS, "network": SMALL}
    plain: dict[str, Any] = {
        "n_steps": 8,
        "batch_size": 16,
        "n_epochs": 2,
        "policy_kwargs": options,
    }
    plain |= {"seed": 0, "device": "cpu"}
    return RecurrentPPO(MaskedRecurrentPolicy, env or vectorised(), **{**plain, **settings})


def enliven(policy: MaskedRecurrentPolicy) -> None:
    """Let the last layers say as much as any trained one's."""
    heads = policy.action_net
    with torch.no_grad():
        for layer in (heads.wait, heads.operations, heads.query, *heads.others.values()):
            layer.weight.mul_(300.0)


# In the library


def test_it_learns_through_rollouts_that_cut_episodes_and_takes_legal_actions_only():
    model = learner()
    before = model.policy.actor().state_dict()
    model.learn(4 * 8 * 3)
    after = model.policy.actor().state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    same = [name for name in after if torch.equal(after[name], before[name])]
    assert [name for name in same if not name.startswith("heads.others.alpha_target")] == []


def test_processes_of_their_own_collect_for_it():
    env = SubprocVecEnv([CuedGrowth] * 2)
    try:
        assert learner(env).learn(2 * 8).num_timesteps == 16
    finally:
        env.close()


def test_learning_begins_with_the_probabilities_that_collecting_drew_by():
    model = learner(n_steps=13, batch_size=20)
    enliven(model.policy)
    _, callback = model._setup_learn(100)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=13)
    num_compared = 0
    for batch in model.rollout_buffer.get(20):
        values, log_probs, entropy = model.policy.evaluate_actions(
            batch.observations, batch.actions, batch.lstm_states, batch.episode_starts
        )
        real = batch.mask > 0.5
        num_compared += int(real.sum())
        assert not real.all()  # rows that only pad a sequence are among them
        torch.testing.assert_close(log_probs[real], batch.old_log_prob[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            values.flatten()[real], batch.old_values[real], atol=1e-5, rtol=1e-5
        )
        _, _, again = model.policy.evaluate_actions(
            batch.observations, batch.actions, batch.lstm_states, batch.episode_starts
        )
        assert torch.equal(again, entropy)  # computed, not drawn
        assert entropy.isfinite().all()
    assert num_compared == 4 * 13


def test_evaluation_and_prediction_carry_the_memory_on():
    model = learner()
    enliven(model.policy)
    for deterministic in (True, False):
        mean, _ = evaluate_policy(
            model, vectorised(), n_eval_episodes=8, deterministic=deterministic, warn=False
        )
        assert 0.0 <= mean <= BEST_RETURN
    observation = CuedGrowth().reset(seed=0)[0]
    _, state = model.predict(observation)
    _, later = model.predict(observation, state=state)
    _, anew = model.predict(observation, state=state, episode_start=np.array([True]))
    assert not np.array_equal(state[0], later[0])
    assert np.array_equal(state[0], anew[0])


def test_the_value_is_of_what_the_critic_remembers():
    policy = learner().policy
    observation = policy.obs_to_tensor(CuedGrowth().reset(seed=0)[0])[0]
    memory, starts = torch.randn(2, 1, 1, SMALL.width), torch.zeros(1)
    fresh = policy.predict_values(observation, tuple(memory), torch.ones(1))
    assert torch.equal(fresh, policy.predict_values(observation, tuple(0 * memory), starts))
    assert not torch.equal(fresh, policy.predict_values(observation, tuple(memory), starts))


def test_a_row_where_nothing_is_legal_is_refused_and_padding_is_not():
    policy = learner().policy
    observation = CuedGrowth().reset(seed=0)[0]
    asked = {key: torch.as_tensor(value)[None] for key, value in observation.items()}
    memory, starts = (torch.zeros(1, 1, SMALL.width),) * 2, torch.zeros(1)
    asked["action_mask"][:, : SIZES[0]] = 0
    with pytest.raises(ValueError, match="no operation is legal"):
        policy.get_distribution(asked, memory, starts)
    nothing = {key: torch.zeros_like(value) for key, value in asked.items()}
    drawn, _ = policy.get_distribution(nothing, memory, starts)
    assert drawn.mode().tolist() == [[0] * len(Head)]
    assert float(drawn.entropy().detach()) == 0.0


def test_the_librarys_own_files_bring_it_back(tmp_path: Path):
    model = learner()
    model.learn(4 * 8)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    observation = CuedGrowth().reset(seed=1)[0]
    expected = model.predict(observation, deterministic=True)
    for loaded in (
        RecurrentPPO.load(tmp_path / "model", device="cpu"),
        MaskedRecurrentPolicy.load(tmp_path / "policy", device="cpu"),
    ):
        found = loaded.predict(observation, deterministic=True)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1][0], expected[1][0])


def _other_actions(made: dict[str, Any]) -> None:
    made["action_space"] = spaces.MultiDiscrete([*SIZES[:-1], 9])


def _no_slot(made: dict[str, Any]) -> None:
    made["action_space"] = spaces.MultiDiscrete([1, *SIZES[1:]])


def _more_blueprints(made: dict[str, Any]) -> None:
    made["blueprints"] = (*BLUEPRINTS, "huge")


def _twice(made: dict[str, Any]) -> None:
    made["blueprints"] = ("large", "small", "large")


def _no_mask(made: dict[str, Any]) -> None:
    made["observation_space"] = made["observation_space"]["obs"]


def _narrow(made: dict[str, Any]) -> None:
    obs = spaces.Box(-1.0, 1.0, (NUM_FEATURES - 1,), np.float32)
    made["observation_space"] = spaces.Dict({**made["observation_space"].spaces, "obs": obs})


def _continuous(made: dict[str, Any]) -> None:
    made["use_sde"] = True


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        (_other_actions, r"the action space has the sizes .* make .* for 2 slots"),
        (_no_slot, "for 0 slots"),
        (_more_blueprints, "4 blueprints and these choices make"),
        (_twice, "named twice: large"),
        (_no_mask, "should be a Dict of the shapes"),
        (_narrow, rf"'obs': \({NUM_FEATURES},\).* is of .*'obs': \({NUM_FEATURES - 1},\)"),
        (_continuous, "use_sde explores continuous actions"),
    ],
)
def test_spaces_of_something_else_are_refused(breaks: Callable[[dict], None], told: str):
    made: dict[str, Any] = {
        "observation_space": CuedGrowth.observation_space,
        "action_space": CuedGrowth.action_space,
        "blueprints": BLUEPRINTS,
        "network": SMALL,
        "use_sde": False,
    }
    breaks(made)
    with pytest.raises(ValueError, match=told):
        MaskedRecurrentPolicy(lr_schedule=lambda _: 1e-3, **made)


def test_actions_that_are_no_choices_are_refused():
    with pytest.raises(TypeError, match="should be a MultiDiscrete"):
        MaskedRecurrentPolicy(
            CuedGrowth.observation_space,
            spaces.Box(-1.0, 1.0, (2,)),
            lambda _: 1e-3,
            blueprints=BLUEPRINTS,
        )


# Exported


def test_the_exported_network_says_bit_for_bit_what_the_library_hears():
    model = learner()
    model.learn(4 * 8)
    policy = model.policy
    policy.set_training_mode(False)
    heard: list[HeadLogits] = []
    policy.action_net.register_forward_hook(lambda *call: heard.append(call[2]))
    network, env, state = policy.actor(), vectorised(3), None
    env.seed(0)
    observation, memory = env.reset(), network.nothing_remembered(3)
    for _ in range(EPISODE_STEPS):
        actions, state = model.predict(observation, state=state, deterministic=True)
        with torch.inference_mode():
            seen = split_features(torch.tensor(observation["obs"]), NUM_SLOTS, len(BLUEPRINTS))
            said, memory = network(seen, network.name_numbers(BLUEPRINTS), memory)
        assert torch.equal(said.operation, heard[-1].operation)
        for head, logits in said.of_slots.items():
            assert torch.equal(logits, heard[-1].of_slots[head])
        assert np.array_equal(memory[0].numpy(), state[0])
        observation = env.step(actions)[0]
    assert len(heard) == EPISODE_STEPS


def growing(epoch: int, stream: random.Random) -> GrowthState:
    choices = tuple(
        BlueprintChoice(name=name, param_count=count)
        for name, count in (("small", 10), ("medium", 100), ("large", 900))
    )
    return GrowthState(
        epoch=epoch,
        step=10 * epoch,
        max_epochs=30,
        losses=tuple(stream.uniform(0.5, 2.0) for _ in range(epoch)),
        slots=tuple(
            SlotState(
                path=path,
                family="cnn",
                dim=8,
                stage=stream.choice(list(SeedStage)),
                alpha=stream.random(),
                choices=choices,
            )
            for path in ("a", "b")
        ),
        param_count=1000,
        host_param_count=1000,
    )


def test_the_deployed_policy_does_what_the_library_predicts(tmp_path: Path):
    model = learner()
    model.learn(4 * 8)
    enliven(model.policy)
    save_policy(tmp_path / "policy.safetensors", model.policy.actor())
    deployed = LearnedPolicy.load(tmp_path / "policy.safetensors")
    stream, state = random.Random(0), None
    asked = []
    for epoch in range(1, 25):
        seen = growing(epoch, stream)
        coder = ActionCoder.of(seen)
        mask = [bit for head in coder.masks(seen) for bit in head]
        observation = {
            "obs": np.array(features(seen, coder), np.float32),
            "action_mask": np.array(mask, np.int8),
        }
        numbers, state = model.predict(observation, state=state, deterministic=True)
        assert deployed.decide(seen) == [coder.decode(numbers.tolist(), seen)]
        asked.append(tuple(numbers.tolist()))
    assert len(set(asked)) >= 5


def test_in_a_run_that_grows_both_decide_alike(tmp_path: Path):
    env = make_env()
    options = {"blueprints": env.coder.blueprints, "choices": env.coder.choices, "network": SMALL}
    model = learner(DummyVecEnv([make_env]), policy_kwargs=options, seed=4)
    enliven(model.policy)
    save_policy(tmp_path / "policy.safetensors", model.policy.actor())
    deployed = LearnedPolicy.load(tmp_path / "policy.safetensors")
    (observation, _), state = env.reset(seed=3), None
    over, asked = False, []
    while not over:
        numbers, state = model.predict(observation, state=state, deterministic=True)
        decided = deployed.decide(env.state)
        assert decided == [env.coder.decode(numbers.tolist(), env.state)]
        asked += decided
        observation, _, over, _, _ = env.step(numbers)
    assert len({action.operation for action in asked}) >= 2


def test_exporting_in_the_midst_of_training_changes_nothing():
    weights = []
    for exports in (False, True):
        model = learner()
        model.learn(4 * 8)
        if exports:
            network = model.policy.actor()
            kept = {name: weight.clone() for name, weight in network.state_dict().items()}
        model.learn(4 * 8, reset_num_timesteps=False)
        weights.append(model.policy.state_dict())
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert all(torch.equal(weight, kept[name]) for name, weight in network.state_dict().items())


# Learning


@pytest.mark.slow
def test_it_learns_to_remember_a_cue_and_to_fill_in_only_what_is_read():
    model = learner(
        vectorised(8),
        n_steps=32,
        batch_size=256,
        n_epochs=8,
        learning_rate=3e-3,
        gamma=0.95,
        ent_coef=0.01,
        normalize_advantage=False,  # all returns are the best soon: it would make noise large
        policy_kwargs={"blueprints": BLUEPRINTS},
    )
    model.learn(4000)
    mean, _ = evaluate_policy(model, vectorised(8), n_eval_episodes=64, warn=False)
    assert mean > 2.7
    assert _mean_return_without_memory(model) < BEST_MEMORYLESS_RETURN + 0.4


def _mean_return_without_memory(model: RecurrentPPO) -> float:
    env, returns = CuedGrowth(), []
    for episode in range(64):
        observation, _ = env.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, over, _, _ = env.step(action)
            total += reward
        returns.append(total)
    return sum(returns) / len(returns)
