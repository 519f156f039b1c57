"""One environment, and the library's own collecting of experience in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import gymnasium
import numpy as np
import safetensors.torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from esper.rl.fragment import LSTM_ARRAYS, STEP_ARRAYS, FinishedEpisode, Fragment, FragmentOrder
from esper.rl.growth_episode import DivergedAtOnceError
from esper.training.random_states import random_streams_apart

AnyEnv = gymnasium.Env[Any, Any]
MakeEnv = Callable[[], AnyEnv]
"""Makes a fresh environment. To be sent to another process, it stands at a module's top level."""
_MAX_BEGINNINGS = 3
"""Runs in a row that may diverge before their first decision."""


class Drawing(IntEnum):
    """What a random seed is for."""

    BUILDING = 0
    ACTIONS = 1
    EPISODE = 2


@dataclass(frozen=True, kw_only=True)
class CollectionSettings:
    """What the learner and all of its workers share.

    Attributes:
        policy: A class for recurrent policies, or the library's name of one.
        policy_options: Keyword arguments of the class.
        gamma: Discount per step.
        gae_lambda: Of the advantages.
        random_seed: Of the whole training.
    """

    policy: str | type[RecurrentActorCriticPolicy]
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    gamma: float
    gae_lambda: float
    random_seed: int

    def seed_for(self, drawing: Drawing, *place: int) -> int:
        """Return a random seed within [0, 2**31), another one for each place."""
        sequence = np.random.SeedSequence(self.random_seed, spawn_key=(drawing, *place))
        return int(sequence.generate_state(1)[0]) >> 1


def weights_as_bytes(policy: nn.Module) -> bytes:
    """Return a policy's state as safetensors; what is shared in it is written for each."""
    state = policy.state_dict()
    return safetensors.torch.save({name: value.cpu().clone() for name, value in state.items()})


class SeededEpisodes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Begins each episode with a random seed that says where it begins, and nothing else.

    The seed is made of the worker, the fragment's number, the attempt at it, and how many of its
    steps have gone. What begins after a fragment's last step begins the next one, so that a worker
    that is made anew there begins the same episode. Where a run diverges before its first decision,
    another one takes its place.

    Args:
        env: To be wrapped.
        settings: Have the seed of the whole training.
        index: Of the worker.
    """

    def __init__(self, env: AnyEnv, settings: CollectionSettings, index: int) -> None:
        super().__init__(env)
        self._settings = settings
        self._index = index
        self._order: FragmentOrder | None = None
        self._num_steps = 0
        self._problems: list[str] = []

    def begin_fragment(self, order: FragmentOrder) -> None:
        """Count steps and episodes as this fragment's from now on."""
        self._order, self._num_steps = order, 0

    def take_problems(self) -> tuple[str, ...]:
        """Return why episodes could not begin since the last call."""
        problems, self._problems = tuple(self._problems), []
        return problems

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._num_steps += 1
        return super().step(action)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; a seed that is given is not used.

        Raises:
            DivergedAtOnceError: Several runs in a row have diverged at once.
        """
        order = self._order
        assert order is not None
        place: tuple[int, ...] = (order.number, order.attempt, self._num_steps)
        if self._num_steps == order.num_steps:
            place = (order.number + 1, 0, 0)
        for again in range(1, _MAX_BEGINNINGS):
            try:
                return self._begin(*place, options=options)
            except DivergedAtOnceError as error:
                self._problems.append(f"a run was left out: {error}")
                place = (*place[:3], again)
        return self._begin(*place, options=options)

    def _begin(self, *place: int, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        seed = self._settings.seed_for(Drawing.EPISODE, self._index, *place)
        return super().reset(seed=seed, options=options)


class FragmentWorker:
    """Plays one environment with weights that it is given, on the CPU.

    The library's `RecurrentPPO` with a single environment collects; here it never learns. Episodes
    and the policy's states go on from one fragment to the next. Once a fragment has failed, the
    worker is not to be asked again.

    Args:
        make_env: Makes the environment, whose observations are a `Dict`. A step's `info` may have
            "reward", its reward by component; the last step's "final", plain values by name.
        settings: Shared with the learner.
        index: Among the workers of the training.

    Raises:
        TypeError: Observations are not a `Dict`.
        Exception: What `make_env` raises.

    Effects: random streams of the process are used, and put back.
    """

    def __init__(self, make_env: MakeEnv, settings: CollectionSettings, index: int) -> None:
        self._settings = settings
        self._index = index
        with random_streams_apart():
            set_random_seed(settings.seed_for(Drawing.BUILDING, index))
            self._env = SeededEpisodes(make_env(), settings, index)
            check_spaces(self._env)
            self._collector = _Collector(
                settings.policy,
                self._env,
                n_steps=1,
                gamma=settings.gamma,
                gae_lambda=settings.gae_lambda,
                policy_kwargs=dict(settings.policy_options),
                device="cpu",
            )
        self._collector.set_logger(Logger(folder=None, output_formats=[]))
        self._watch = _EpisodeWatch()

    def collect(self, order: FragmentOrder) -> Fragment:
        """Return a fragment; what is random in it follows from the order and the settings.

        Raises:
            ValueError: A reward is not finite, or what the policy makes of an observation.
            RuntimeError: The weights are of another policy.
            Exception: What the environment raises.
        """
        place = (self._index, order.number, order.attempt)
        self._env.begin_fragment(order)
        with random_streams_apart():
            set_random_seed(self._settings.seed_for(Drawing.ACTIONS, *place))
            self._collector.policy.load_state_dict(safetensors.torch.load(order.weights))
            self._collector.fill(order.num_steps, self._watch)
        buffer = self._collector.rollout_buffer
        fragment = Fragment(
            observations=dict(buffer.observations),
            steps={name: getattr(buffer, name) for name in STEP_ARRAYS},
            lstm_states={name: getattr(buffer, name) for name in LSTM_ARRAYS},
            episodes=self._watch.take(),
            problems=self._env.take_problems(),
        )
        _check_finite(fragment)
        return fragment

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def check_spaces(env: AnyEnv) -> tuple[gymnasium.spaces.Dict, gymnasium.Space[Any]]:
    """Return the spaces of observations and of actions.

    Raises:
        TypeError: Observations are not a `Dict`.
    """
    if not isinstance(env.observation_space, gymnasium.spaces.Dict):
        raise TypeError(
            "observations must be a gymnasium.spaces.Dict, as of 'obs' and 'action_mask', got "
            f"{env.observation_space}"
        )
    return env.observation_space, env.action_space


class _Collector(RecurrentPPO):
    """Fills its rollout buffer, and leaves it at that."""

    def train(self) -> None:
        """Learn nothing."""

    def fill(self, num_steps: int, watch: BaseCallback) -> None:
        """Take so many steps; the buffer has them, and no others, afterwards."""
        buffer = self.rollout_buffer
        assert isinstance(buffer, RecurrentDictRolloutBuffer)
        self.n_steps = buffer.buffer_size = num_steps
        buffer.hidden_state_shape = (num_steps, *buffer.hidden_state_shape[1:])
        self.learn(num_steps, callback=watch, reset_num_timesteps=False)


class _EpisodeWatch(BaseCallback):
    """Keeps what finished episodes came to."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, float] = {}
        self._finished: list[FinishedEpisode] = []

    def take(self) -> tuple[FinishedEpisode, ...]:
        """Return the episodes that have finished since the last call."""
        finished, self._finished = tuple(self._finished), []
        return finished

    def _on_step(self) -> bool:
        (info,), (done,) = self.locals["infos"], self.locals["dones"]
        for name, value in info.get("reward", {}).items():
            self._parts[name] = self._parts.get(name, 0.0) + float(value)
        if done:
            told = info["episode"]
            self._finished.append(
                FinishedEpisode(
                    episode_return=float(told["r"]),
                    num_steps=int(told["l"]),
                    seconds=float(told["t"]),
                    return_parts=self._parts,
                    final=dict(info.get("final", {})),
                )
            )
            self._parts = {}
        return True


def _check_finite(fragment: Fragment) -> None:
    for name in ("rewards", "values", "log_probs", "returns"):
        finite = np.isfinite(fragment.steps[name])
        if not finite.all():
            step = int(np.argmin(finite[:, 0]))
            found = fragment.steps[name][step, 0]
            raise ValueError(f"{name} must be finite, got {found} at step {step} of {len(finite)}")
