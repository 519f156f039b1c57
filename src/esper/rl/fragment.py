"""What a worker is asked for, and what it hands back: plain arrays and numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

STEP_ARRAYS = (
    "actions",
    "rewards",
    "returns",
    "advantages",
    "values",
    "log_probs",
    "episode_starts",
)
"""What the library's rollout buffer keeps of each step, besides observations."""
LSTM_ARRAYS = ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf")
"""The states of both LSTMs before each step."""


@dataclass(frozen=True, kw_only=True)
class FragmentOrder:
    """Which fragment is to be collected.

    Attributes:
        weights: Of the policy, as `weights_as_bytes` makes them.
        num_steps: Of the environment.
        number: Of the learner's rollout that it is for, from 0.
        attempt: How many have tried it before.
    """

    weights: bytes
    num_steps: int
    number: int
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class FinishedEpisode:
    """What an episode came to, which may have begun in a fragment before.

    Attributes:
        episode_return: Sum of its rewards, undiscounted.
        num_steps: It took.
        seconds: Since the worker had been made.
        return_parts: Sums of what each step's `info["reward"]` named, if it did.
        final: The last step's `info["final"]`, if it had one.
    """

    episode_return: float
    num_steps: int
    seconds: float
    return_parts: Mapping[str, float] = field(default_factory=dict)
    final: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Some steps of one environment, as the library's rollout buffer keeps them.

    T steps, N environments, which is 1, L layers, H units of an LSTM.

    Attributes:
        observations: By name, T N ….
        steps: By the names of `STEP_ARRAYS`, T N, and actions T N A.
        lstm_states: By the names of `LSTM_ARRAYS`, T L N H.
        episodes: That ended in these steps.
        problems: Why episodes could not begin; others were begun in their place.
    """

    observations: Mapping[str, Array]
    steps: Mapping[str, Array]
    lstm_states: Mapping[str, Array]
    episodes: tuple[FinishedEpisode, ...]
    problems: tuple[str, ...] = ()
