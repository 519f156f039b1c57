"""The library's recurrent PPO, learning from fragments that workers collect."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import numpy as np
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from esper.rl.fragment import LSTM_ARRAYS, STEP_ARRAYS, FinishedEpisode, Fragment, FragmentOrder
from esper.rl.fragment_worker import CollectionSettings, weights_as_bytes
from esper.rl.workers import Workers
from esper.training.optimizer_state import load_optimizer_state, optimizer_state
from esper.training.random_states import random_states, set_random_states


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What came of asking all workers for a fragment."""

    number: int
    episodes: tuple[FinishedEpisode, ...]
    problems: tuple[str, ...]
    """Why episodes could not begin, and others have taken their place."""
    seconds: float


@final
class DistributedPPO(RecurrentPPO):
    """`RecurrentPPO` whose rollouts are collected by workers, with one environment each.

    Losses, optimizer, returns and advantages are the library's: fragments stand side by side in its
    rollout buffer as if one process had stepped all environments.

    Args:
        settings: Shared with the workers.
        observation_space: Of the environments.
        action_space: The same.
        workers: Made with the same settings.
        learning: Further keyword arguments of `RecurrentPPO`: steps per fragment (`n_steps`),
            learning rate, epochs and so on.

    Effects: seeds the process's random streams, from which learning draws.
    """

    def __init__(
        self,
        settings: CollectionSettings,
        observation_space: spaces.Dict,
        action_space: spaces.Space[Any],
        workers: Workers,
        **learning: Any,
    ) -> None:
        self.workers = workers
        self.num_rollouts = 0
        self.last_rollout: Rollout | None = None
        super().__init__(
            settings.policy,
            _SpacesOnly(workers.num_workers, observation_space, action_space),
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            policy_kwargs=dict(settings.policy_options),
            seed=settings.random_seed,
            **learning,
        )

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Fill the rollout buffer with a fragment of each worker.

        Returns:
            False if the callback wants no more; it is asked once, when all steps are there.

        Raises:
            WorkersFailedError: A worker failed too often in a row.
        """
        rollout_buffer.reset()
        assert isinstance(rollout_buffer, RecurrentDictRolloutBuffer)
        started = time.perf_counter()
        callback.on_rollout_start()
        fragments = self.workers.collect_all(
            FragmentOrder(
                weights=weights_as_bytes(self.policy),
                num_steps=n_rollout_steps,
                number=self.num_rollouts,
            )
        )
        _fill(rollout_buffer, fragments)
        episodes = tuple(episode for fragment in fragments for episode in fragment.episodes)
        self.last_rollout = Rollout(
            number=self.num_rollouts,
            episodes=episodes,
            problems=tuple(
                f"worker {index}: {problem}"
                for index, fragment in enumerate(fragments)
                for problem in fragment.problems
            ),
            seconds=time.perf_counter() - started,
        )
        self.num_rollouts += 1
        self.num_timesteps += n_rollout_steps * len(fragments)
        self._update_info_buffer([{"episode": _library_info(episode)} for episode in episodes])
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        callback.on_rollout_end()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what learning goes on from, between two rollouts: plain values and tensors."""
        return {
            "policy": dict(self.policy.state_dict()),
            "optimizer": optimizer_state(self.policy.optimizer, self.policy),
            "num_timesteps": self.num_timesteps,
            "num_rollouts": self.num_rollouts,
            "num_epochs": self._n_updates,
            "recent_episodes": list(self.ep_info_buffer or ()),
            "random_states": random_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; episodes in flight then begin anew.

        Raises:
            ValueError: It is the state of another policy or optimizer.

        Effects: sets the process's random streams.
        """
        try:
            self.policy.load_state_dict(state["policy"])
        except RuntimeError as error:
            raise ValueError(f"this is the state of another policy: {error}") from error
        load_optimizer_state(self.policy.optimizer, self.policy, state["optimizer"])
        self.num_timesteps = state["num_timesteps"]
        self.num_rollouts = state["num_rollouts"]
        self._n_updates = state["num_epochs"]
        window = self._stats_window_size
        self.ep_info_buffer = deque(state["recent_episodes"], maxlen=window)
        self.ep_success_buffer = deque(maxlen=window)
        set_random_states(state["random_states"])


def _fill(buffer: RecurrentDictRolloutBuffer, fragments: Sequence[Fragment]) -> None:
    """Put fragments side by side, as environments of one rollout."""
    buffer.observations = {
        name: np.concatenate([fragment.observations[name] for fragment in fragments], axis=1)
        for name in buffer.observations
    }
    for name in STEP_ARRAYS:
        steps = np.concatenate([fragment.steps[name] for fragment in fragments], axis=1)
        setattr(buffer, name, steps)
    for name in LSTM_ARRAYS:
        states = np.concatenate([fragment.lstm_states[name] for fragment in fragments], axis=2)
        setattr(buffer, name, states)
    buffer.pos, buffer.full = buffer.buffer_size, True


def _library_info(episode: FinishedEpisode) -> dict[str, float]:
    return {"r": episode.episode_return, "l": episode.num_steps, "t": episode.seconds}


class _SpacesOnly(VecEnv):
    """Has the spaces of environments that are elsewhere; the library wants to reset it once."""

    def reset(self) -> dict[str, Any]:
        """Return observations that nobody looks at."""
        assert isinstance(self.observation_space, spaces.Dict)
        return {
            name: np.zeros((self.num_envs, *(space.shape or ())), space.dtype)
            for name, space in self.observation_space.spaces.items()
        }

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return None for the render mode, which the library asks for.

        Raises:
            AttributeError: For anything else.
        """
        if attr_name != "render_mode":
            raise AttributeError(attr_name)
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None:
        """Nothing is open."""

    def step_async(self, actions: Any) -> NoReturn:
        self._refuse()

    def step_wait(self) -> NoReturn:
        self._refuse()

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> NoReturn:
        self._refuse()

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError("the environments of a DistributedPPO are at its workers, not here")
