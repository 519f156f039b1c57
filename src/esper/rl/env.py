"""A growing network as a Gymnasium environment."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esper.lifecycle.actions import GrowthState
from esper.lifecycle.events import ActionRefused, GateEvaluated, GerminationFailed
from esper.policies.learned.action_coder import ActionChoices, ActionCoder, Head
from esper.policies.learned.features import ObservationConfig, feature_names, features
from esper.rl.growth_episode import GrowthEpisode, MakeHostRun
from esper.rl.rewards import RewardConfig
from esper.training.random_states import (
    random_states,
    random_streams_apart,
    seed_random_streams,
)

Observation = dict[str, NDArray[Any]]
_MAX_RANDOM_SEED = 2**31 - 1


ENV_ID = "esper/Growth-v0"
"""Known to `gymnasium.make` once `esper.rl` is imported."""


class GrowthEnv(gymnasium.Env[Observation, NDArray[np.int64]]):
    """An episode is a training run, a step what lies between two decisions of it.

    **Actions** are `MultiDiscrete`, a choice per `Head`: operation and slot together, blueprint,
    blend operator, alpha target, ramp steps, ramp curve. An operation reads the heads that
    `READ_HEADS` says, the others mean nothing. What is not legal is refused, changes nothing, and
    costs as any intervention. A blueprint that does not fit the slot stands for the next one of the
    head that does; `info["resolved"]` says so.

    **Observations** are a `Dict`: "obs", numbers in [-1, 1] that `feature_names` names, and
    "action_mask", a bit per choice of each head, head after head. The mask is in
    `info["action_mask"]` and `action_masks()` too.

    **Rewards** are `esper.rl.rewards`, by component in `info["reward"]` and among the run's events.

    **The end.** A run has a known number of decisions, and what is left of them is observed: after
    the last one the episode *terminates*, as it does if the run diverges (`info["diverged"]`).
    Nothing is truncated, unless a wrapper does. A run that its safeguard takes back to an earlier
    state comes to decisions again, or to fewer than were planned: the episode is then longer or
    shorter, and `info["decision"]` tells which decision is due.

    **Random streams.** `reset(seed=S)` trains the run of random seed S; later ones draw their seeds
    from there. Episodes draw from streams of their own: what else the process draws changes none,
    and nothing outside is changed.

    Args:
        make_run: Makes the run of an episode from its random seed. `TaskRuns` does for a task.
        rewards: What decisions are weighed by.
        choices: Of the heads that are the same for every slot.
        observation: Which loss is seen; rewards are of the held-out one in any case.
        render_mode: "ansi" renders a line per slot.

    Raises:
        ValueError: There is no slot, or no blueprint with parameters fits one.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 – as the base has it

    def __init__(
        self,
        make_run: MakeHostRun,
        *,
        rewards: RewardConfig | None = None,
        choices: ActionChoices | None = None,
        observation: ObservationConfig | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be 'ansi' or None, got {render_mode!r}")
        self.render_mode = render_mode
        self.rewards = rewards or RewardConfig()
        self.make_run = make_run
        self._seen = observation or ObservationConfig()
        with random_streams_apart():
            seed_random_streams(0)
            state = make_run(0).trainer.growth.state()
        self.coder = ActionCoder.of(state, choices)
        self.feature_names = feature_names(self.coder)
        """What each number of the observation's "obs" is."""
        self.action_space = spaces.MultiDiscrete(self.coder.sizes)
        seen: dict[str, spaces.Space[Any]] = {
            "obs": spaces.Box(-1.0, 1.0, (len(self.feature_names),), np.float32),
            "action_mask": spaces.MultiBinary(sum(self.coder.sizes)),
        }
        self.observation_space: spaces.Space[Any] = spaces.Dict(seen)
        self.random_seed: int | None = None
        """Of the episode's run."""
        self._episode: GrowthEpisode | None = None
        self._streams: Mapping[str, Any] = {}
        self._return = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a run, and train it up to its first decision; where that fails there is none.

        Args:
            seed: Random seed of the run.
            options: None are known.

        Raises:
            DivergedAtOnceError, ValueError: As `GrowthEpisode`, or there are options.
        """
        self.close()
        super().reset(seed=seed)
        if options:
            raise ValueError(f"options {sorted(options)} are not known; this environment has none")
        drawn = self.np_random.integers(_MAX_RANDOM_SEED)
        self.random_seed = int(drawn) if seed is None else seed
        self._return = 0.0
        with random_streams_apart():
            seed_random_streams(self.random_seed)
            self._episode = GrowthEpisode(self.make_run(self.random_seed), self.rewards)
            self._streams = random_states()
        return self._observation(), self._info()

    def step(
        self, action: NDArray[np.int64] | Sequence[int]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Carry out one action, and train on to the next decision.

        Raises:
            ValueError: The action has another form, or no reward can be made of what came.
            RuntimeError: There is no episode, or it is over.

        Effects: an error ends the episode, unless it is of the action's form.
        """
        episode = self._running()
        before = episode.state
        numbers = _whole_numbers(action)
        asked = self.coder.decode(numbers, before)
        with random_streams_apart(self._streams):
            reward = episode.play([asked])
            self._streams = random_states()
        self._return += reward.total
        info = self._info()
        info["action"] = asked.model_dump(mode="json")
        info["resolved"] = self._was_resolved(numbers, asked.model_dump())
        info["refused"] = self._refusals(episode)
        info["reward"] = reward.components
        if episode.over:
            info["final"] = {
                **episode.final_metrics,
                "return": self._return,
                "param_count": episode.state.param_count,
                "committed": sum(slot.committed for slot in episode.state.slots),
            }
        return self._observation(), reward.total, episode.over, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Return a bit per choice of each head, head after head."""
        masks = self.coder.masks(self._begun().state)
        return np.array([bit for mask in masks for bit in mask], dtype=np.bool_)

    def render(self) -> str | None:
        """Return a line per slot; None without a render mode."""
        if self.render_mode is None:
            return None
        state = self._begun().state
        lines = [f"decision {state.epoch} of {state.max_epochs}, loss {self._begun().loss:.4f}"]
        lines += [
            f"{slot.path}: {slot.stage} {slot.blueprint or ''} alpha {slot.alpha:.2f}, "
            f"committed {slot.committed}"
            for slot in state.slots
        ]
        return "\n".join(lines)

    def close(self) -> None:
        """Let the run go."""
        self._episode = None

    @property
    def state(self) -> GrowthState:
        """What there is to decide by, as policies see it."""
        return self._begun().state

    def _begun(self) -> GrowthEpisode:
        if self._episode is None:
            raise RuntimeError("there is no episode; call reset() first")
        return self._episode

    def _running(self) -> GrowthEpisode:
        episode = self._begun()
        if episode.over:
            raise RuntimeError("the episode is over; call reset() to begin another one")
        return episode

    def _observation(self) -> Observation:
        state = self._begun().state
        values = np.array(features(state, self.coder, self._seen), dtype=np.float32)
        mask = self.action_masks().astype(np.int8)
        return {"obs": values, "action_mask": mask}

    def _info(self) -> dict[str, Any]:
        episode = self._begun()
        return {
            "action_mask": self.action_masks(),
            "random_seed": self.random_seed,
            "decision": episode.state.epoch,
            "loss": episode.loss,
            "diverged": episode.diverged,
        }

    def _was_resolved(self, numbers: Sequence[int], asked: Mapping[str, Any]) -> bool:
        named = self.coder.blueprints[numbers[Head.BLUEPRINT]]
        return bool(asked.get("blueprint", named) != named)

    def _refusals(self, episode: GrowthEpisode) -> list[str]:
        """Return why what was asked has not come about."""
        told = []
        for event in episode.caused:
            if isinstance(event, ActionRefused):
                told.append(event.reason)
            elif isinstance(event, GerminationFailed):
                told.append(event.error)
            elif isinstance(event, GateEvaluated) and not event.result.passed:
                told.append(str(event.result))
        return told


def _whole_numbers(action: NDArray[np.int64] | Sequence[int]) -> list[int]:
    try:
        return [operator.index(number) for number in action]
    except TypeError as error:
        raise ValueError(
            f"an action is whole numbers, the choice of each of {len(Head)} heads, got {action!r}"
        ) from error


gymnasium.register(ENV_ID, entry_point="esper.rl.env:GrowthEnv")
