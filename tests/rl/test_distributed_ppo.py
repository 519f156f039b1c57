"""What workers collect is learned from as the library learns from its own."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed

from esper.rl.distributed_ppo import DistributedPPO
from esper.rl.fragment import LSTM_ARRAYS, STEP_ARRAYS
from esper.rl.fragment_worker import Drawing, FragmentWorker, SeededEpisodes
from esper.rl.workers import InProcessWorkers
from esper.training.random_states import random_states, set_random_states
from rl_toys import EPISODE_STEPS, SETTINGS, CueEnv, order, stock

NUM_STEPS = 3 * EPISODE_STEPS - 1
"""So that episodes go on from one fragment to the next."""
LEARNING: dict[str, Any] = {"n_steps": NUM_STEPS, "batch_size": 6, "n_epochs": 3}


def distributed(num_workers: int) -> DistributedPPO:
    return DistributedPPO(
        SETTINGS,
        CueEnv.observation_space,
        CueEnv.action_space,
        InProcessWorkers(CueEnv, SETTINGS, num_workers=num_workers),
        device="cpu",
        **LEARNING,
    )


class StreamsOfAWorker(BaseCallback):
    """Lets the library collect with the random streams that worker 0 has."""

    def __init__(self, env: SeededEpisodes) -> None:
        super().__init__()
        self.env = env
        self.number = 0
        self.env.begin_fragment(order(0, num_steps=NUM_STEPS))

    def _on_rollout_start(self) -> None:
        self.outside = random_states()
        self.env.begin_fragment(order(self.number, num_steps=NUM_STEPS))
        set_random_states(self.outside)  # making the order has drawn
        set_random_seed(SETTINGS.seed_for(Drawing.ACTIONS, 0, self.number, 0))

    def _on_rollout_end(self) -> None:
        set_random_states(self.outside)
        self.number += 1

    def _on_step(self) -> bool:
        return True


def test_one_worker_teaches_what_the_library_learns_by_itself_to_the_bit() -> None:
    env = SeededEpisodes(CueEnv(), SETTINGS, 0)
    callback = StreamsOfAWorker(env)
    expected = stock(env, **LEARNING)
    expected.learn(4 * NUM_STEPS, callback=callback)
    learner = distributed(num_workers=1)
    first = {name: weights.clone() for name, weights in learner.policy.state_dict().items()}
    learner.learn(4 * NUM_STEPS)
    for name, weights in learner.policy.state_dict().items():
        assert torch.equal(weights, expected.policy.state_dict()[name]), name
    assert any(not torch.equal(first[name], w) for name, w in learner.policy.state_dict().items())
    assert [(e["r"], e["l"]) for e in learner.ep_info_buffer or ()] == [
        (e["r"], e["l"]) for e in expected.ep_info_buffer or ()
    ]
    assert learner.num_timesteps == expected.num_timesteps == 4 * NUM_STEPS


class KeptRollouts(BaseCallback):
    """Keeps what the learner is about to learn from."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Any]] = []

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.kept.append({name: getattr(buffer, name) for name in (*STEP_ARRAYS, *LSTM_ARRAYS)})

    def _on_step(self) -> bool:
        return True


def test_fragments_stand_side_by_side_as_environments() -> None:
    learner, callback = distributed(num_workers=3), KeptRollouts()
    learner.set_logger(Logger(folder=None, output_formats=[]))
    alone = order(num_steps=NUM_STEPS)
    learner.policy.load_state_dict(stock(CueEnv()).policy.state_dict())
    learner.learn(3 * NUM_STEPS, callback=callback)
    (kept,) = callback.kept
    for index in range(3):
        fragment = FragmentWorker(CueEnv, SETTINGS, index).collect(alone)
        for name in STEP_ARRAYS:
            np.testing.assert_array_equal(kept[name][:, index], fragment.steps[name][:, 0])
        for name in LSTM_ARRAYS:
            np.testing.assert_array_equal(
                kept[name][:, :, index], fragment.lstm_states[name][:, :, 0]
            )
    assert learner.last_rollout is not None
    assert len(learner.last_rollout.episodes) == 3 * (NUM_STEPS // EPISODE_STEPS)
    assert np.isfinite(learner.logger.name_to_value["train/explained_variance"])


def test_observations_that_are_no_dict_are_refused() -> None:
    class Plain(CueEnv):
        observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    with pytest.raises(TypeError, match=r"must be a gymnasium\.spaces\.Dict"):
        FragmentWorker(Plain, SETTINGS, 0)
