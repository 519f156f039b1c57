"""Small environments, and the ways in which one can fail; other processes import this module."""

import math
import os
import signal
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO

from esper.rl.fragment import FragmentOrder
from esper.rl.fragment_worker import CollectionSettings, weights_as_bytes
from esper.rl.growth_episode import DivergedAtOnceError

EPISODE_STEPS = 4
NUM_CUES = 3
SETTINGS = CollectionSettings(
    policy="MultiInputLstmPolicy",
    policy_options={"lstm_hidden_size": 4, "net_arch": [4]},
    gamma=0.9,
    gae_lambda=0.8,
    random_seed=7,
)


class CueEnv(gymnasium.Env):
    """Shows a cue at first; each later step pays for naming it. Episodes are equally long."""

    observation_space = spaces.Dict(
        {
            "obs": spaces.Box(-1.0, 1.0, (NUM_CUES + 1,), np.float32),
            "action_mask": spaces.MultiBinary(NUM_CUES + 2),
        }
    )
    action_space = spaces.MultiDiscrete([NUM_CUES, 2])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.cue = int(self.np_random.integers(NUM_CUES))
        self.time = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        named, noise = float(action[0] == self.cue), float(self.np_random.normal())
        parts = {"named": named, "noise": 0.01 * noise}
        info: dict[str, Any] = {"reward": parts}
        over = self.time == EPISODE_STEPS
        if over:
            info["final"] = {"cue": self.cue, "threads": torch.get_num_threads(), "task": "toy"}
        return self._observation(), sum(parts.values()), over, False, info

    def _observation(self) -> dict[str, Any]:
        obs = np.zeros(NUM_CUES + 1, np.float32)
        obs[-1] = self.time / EPISODE_STEPS
        if self.time == 0:
            obs[self.cue] = 1.0
        return {"obs": obs, "action_mask": np.ones(NUM_CUES + 2, np.int8)}


@dataclass(frozen=True)
class Failing:
    """Makes environments that fail in the midst of an episode: each in the next way, then none.

    Attributes:
        ways: "kill" ends the process with SIGKILL, "raise" raises, "nan" pays what is no number.
        folder: Remembers what has failed.
        step: Of the environment's life, from 1.
    """

    ways: tuple[str, ...]
    folder: Path
    step: int = 6

    def __call__(self) -> gymnasium.Env:
        return _FailingEnv(self)

    def take(self) -> str:
        """Return the next way, once; none when all have been."""
        for way in self.ways:
            with suppress(FileExistsError):
                (self.folder / way).touch(exist_ok=False)
                return way
        return ""


class _FailingEnv(CueEnv):
    def __init__(self, failing: Failing) -> None:
        self.failing = failing
        self.num_steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.num_steps += 1
        observation, reward, over, cut, info = super().step(action)
        match self.failing.take() if self.num_steps == self.failing.step else "":
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise ValueError("reward component 'progress' is nan")
            case "nan":
                reward = math.nan
        return observation, reward, over, cut, info


DIES = "MACHINE_DIES"
"""Name of a variable in the environment of a machine that is to die."""


class MachineDyingEnv(CueEnv):
    """Kills the process that has started its own, Ray's of the machine, if that is to die."""

    num_steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.num_steps += 1
        if DIES in os.environ and self.num_steps == Failing.step:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60.0)  # this one is ended with it
        return super().step(action)


class BrokenEnv(CueEnv):
    """Fails at every step."""

    def step(self, action: Any) -> Any:
        raise ValueError("the host cannot be trained")


class DivergingEnv(CueEnv):
    """Cannot begin some of its episodes: those that are asked for at these times, from 1."""

    def __init__(self, bad_beginnings: Container[int]) -> None:
        self.bad_beginnings = bad_beginnings
        self.num_beginnings = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self.num_beginnings += 1
        if self.num_beginnings in self.bad_beginnings:
            raise DivergedAtOnceError("no run of this")
        return super().reset(seed=seed, options=options)


class StuckEnv(CueEnv):
    """Says so, and never finishes a step."""

    def step(self, action: Any) -> Any:
        os.write(1, b"stuck\n")
        while True:
            signal.pause()


def order(
    number: int = 0, *, attempt: int = 0, num_steps: int = 2 * EPISODE_STEPS
) -> FragmentOrder:
    """Order a fragment of whole episodes, with weights that are always the same."""
    return FragmentOrder(
        weights=weights_as_bytes(stock(CueEnv()).policy),
        num_steps=num_steps,
        number=number,
        attempt=attempt,
    )


def stock(env: gymnasium.Env, **learning: Any) -> RecurrentPPO:
    """Make the library's own algorithm with the settings of these tests."""
    return RecurrentPPO(
        SETTINGS.policy,
        env,
        gamma=SETTINGS.gamma,
        gae_lambda=SETTINGS.gae_lambda,
        policy_kwargs=dict(SETTINGS.policy_options),
        seed=SETTINGS.random_seed,
        device="cpu",
        **learning,
    )
