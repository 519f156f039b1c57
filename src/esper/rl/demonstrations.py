"""Learning first from what another policy does, so that learning from rewards begins there."""

from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, FiniteFloat
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from torch import Tensor

from esper.experiments.config import RunConfig
from esper.experiments.parts import chosen_policy
from esper.experiments.worker_pool import WorkerDiedError, worker_pool
from esper.lifecycle.actions import (
    Action,
    Advance,
    Germinate,
    GrowthState,
    IllegalAction,
    Wait,
    check_action,
)
from esper.lifecycle.record import Record
from esper.policies.heuristic import HeuristicPolicy
from esper.policies.learned import ActionChoices, ActionCoder
from esper.policies.named import policy_of_anywhere
from esper.rl.env import GrowthEnv
from esper.rl.fragment_worker import MakeEnv
from esper.rl.growth_episode import DivergedAtOnceError
from esper.rl.masked_policy import MaskedRecurrentPolicy
from esper.rl.policy_training import PolicyDivergedError, not_finite
from esper.slots.config import SlotConfig
from esper.training.policy import Policy

AtLeastOne = Annotated[int, Field(ge=1)]

_CHOICES = tuple(f"actions.{name}" for name in ActionChoices.model_fields)
"""Settings of what heads offer."""
_DECAY_FRACTION = 1.0 / 3.0
"""Of the passes; without it what is done last undoes some of what was done before."""
_VALUE_COEFFICIENT = 0.5
_MAX_GRADIENT_NORM = 0.5


class NotImitableError(ValueError):
    """A policy takes actions that the environment does not offer, or none of its runs is whole."""


class DemonstrationConfig(Record):
    """What is imitated, before anything is learned from rewards."""

    policy: Annotated[str, AfterValidator(policy_of_anywhere)] = HeuristicPolicy.name
    """By name, or a file."""
    num_episodes: AtLeastOne = 32
    passes: AtLeastOne = 40
    """Over all demonstrated episodes."""
    batch_episodes: AtLeastOne = 8
    learning_rate: Annotated[FiniteFloat, Field(gt=0.0)] = 1e-3
    """Falls to nothing over the last passes, a third of them."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """An episode of T decisions, as the environment showed and took it.

    Attributes:
        observations: By name, T ….
        actions: T 6.
        rewards: T.
        num_planned: Decisions that its run was to have.
        diverged: Whether its run did, be it after the last of them.
    """

    observations: dict[str, NDArray[Any]]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float32]
    num_planned: int
    diverged: bool

    @property
    def is_whole(self) -> bool:
        """Whether it has them and came to its end; a run that goes back has mostly others."""
        return len(self.actions) == self.num_planned and not self.diverged


def demonstrating_policy(config: DemonstrationConfig, run: RunConfig) -> Policy:
    """Return the policy that is to be imitated, fresh.

    Args:
        config: Says who.
        run: That it decides for, with the policy's own settings.

    Raises:
        SettingsError: There is no such policy.
    """
    return chosen_policy(run.model_copy(update={"policy": config.policy}))


def demonstrations(
    config: DemonstrationConfig, run: RunConfig, make_env: MakeEnv, *, processes: int
) -> list[Demonstration]:
    """Let a policy play episodes, of the runs 0, 1, 2 and so on; return them in this order.

    A run that diverges before its first decision is left out.

    Args:
        config: Says who, and how many.
        run: Of the episodes' runs, with the policy's own settings.
        make_env: Makes a `GrowthEnv`, in whatever process.
        processes: How many play at a time.

    Raises:
        SettingsError: There is no such policy.
        NotImitableError: It takes actions that the environment does not offer, or each run has
            diverged before its first decision.
        WorkerDiedError: A process was killed.
    """
    demonstrating_policy(config, run)
    seeds = range(config.num_episodes)
    shares = [seeds[index::processes] for index in range(min(processes, len(seeds)))]
    try:
        with worker_pool(processes) as pool:
            playing = [pool.submit(_play, config, run, make_env, share) for share in shares]
            played = [share.result() for share in playing]
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            f"a process that let {config.policy} play was killed, perhaps for want of memory; "
            "begin again in another folder, with fewer workers"
        ) from error
    turns = range(config.num_episodes)
    shown = [played[turn % len(played)][turn // len(played)] for turn in turns]
    begun = [one for one in shown if one is not None]
    if not begun:
        raise NotImitableError(
            f"{config.policy} cannot be imitated, all of its {len(shown)} runs diverged before "
            "their first decision; give them a smaller learning_rate"
        )
    return begun


def _play(
    config: DemonstrationConfig, run: RunConfig, make_env: MakeEnv, seeds: Sequence[int]
) -> list[Demonstration | None]:
    """Return what is shown by each run; None of one that diverges before its first decision."""
    env = make_env()
    assert isinstance(env, GrowthEnv)
    shown: list[Demonstration | None] = []
    for seed in seeds:
        try:
            shown.append(demonstrate(config, run, env, seed))
        except DivergedAtOnceError:
            shown.append(None)
    return shown


def demonstrate(
    config: DemonstrationConfig, run: RunConfig, env: GrowthEnv, seed: int
) -> Demonstration:
    """Let a policy play one episode; slots take turns where it asks for more than one action.

    What a germination asks for besides its blueprint and blend operator is left to the blueprint.

    Args:
        config: Says who.
        run: Of the episode's run, with the policy's own settings.
        env: Of the same task.
        seed: Of the run, and of the policy.

    Raises:
        NotImitableError: It takes an action that the environment does not offer.
        DivergedAtOnceError: The run has diverged before its first decision.
    """
    teacher = demonstrating_policy(config, run.model_copy(update={"random_seed": seed}))
    observation, _ = env.reset(seed=seed)
    seen, taken, earned = [], [], []
    turns = _Turns()
    over = False
    while not over:
        action = turns.choose(teacher.decide(env.state), env.state)
        numbers = _encoded(env.coder, _named(action, run.slot), config.policy)
        seen.append(observation)
        taken.append(numbers)
        observation, reward, over, _, info = env.step(numbers)
        earned.append(reward)
    names, num_planned = seen[0], env.state.max_epochs
    assert num_planned is not None
    return Demonstration(
        observations={name: np.stack([one[name] for one in seen]) for name in names},
        actions=np.array(taken, dtype=np.int64),
        rewards=np.array(earned, dtype=np.float32),
        num_planned=num_planned,
        diverged=info["diverged"],
    )


class _Turns:
    """Chooses, of the actions that a policy asks for, the one that the environment can take.

    It is the first that is legal for the slot which has waited for longest. A germination that had
    no turn counts as asked for until it has one, another is asked for in its slot, or that cannot
    take a seed any more; what tends a seed policies ask for again by themselves.
    """

    def __init__(self) -> None:
        self._num_chosen = 0
        self._last: dict[str, int] = {}
        """When each slot had its turn."""
        self._waiting: dict[str, Germinate] = {}
        """By slot, what had no turn yet, the oldest first."""

    def choose(self, actions: Sequence[Action], state: GrowthState) -> Action:
        """Return the action to take now."""
        asked = [action for action in actions if not isinstance(action, Wait)]
        anew = {action.slot for action in asked if isinstance(action, Germinate)}
        waiting = [action for slot, action in self._waiting.items() if slot not in anew]
        legal = [action for action in (*waiting, *asked) if _is_legal(action, state)]
        self._waiting = {action.slot: action for action in legal if isinstance(action, Germinate)}
        if not legal:
            return Wait()
        chosen = min(legal, key=lambda action: self._last.get(action.slot, 0))
        self._num_chosen += 1
        self._last[chosen.slot] = self._num_chosen
        self._waiting.pop(chosen.slot, None)
        return chosen


def _is_legal(action: Action, state: GrowthState) -> bool:
    try:
        check_action(state, action)
    except IllegalAction:
        return False
    return True


def _encoded(coder: ActionCoder, action: Action, policy: str) -> list[int]:
    try:
        return coder.encode(action)
    except ValueError as error:
        raise NotImitableError(
            f"{policy} cannot be imitated, it asks for {action!r}: {error}; but for slots and "
            f"blueprints, that is set by {', '.join(_CHOICES)}"
        ) from error


def _named(action: Action, slot: SlotConfig) -> Action:
    """Return an action that names the blend operator or the ramp that it leaves to the slot."""
    if isinstance(action, Germinate):
        operator = action.blend_operator or slot.blend_operator
        return action.model_copy(update={"blend_operator": operator})
    if not isinstance(action, Advance):
        return action
    steps = slot.ramp_steps if action.ramp_steps is None else action.ramp_steps
    return action.model_copy(
        update={"ramp_steps": steps, "ramp_curve": action.ramp_curve or slot.ramp_curve}
    )


def imitate(
    policy: MaskedRecurrentPolicy,
    shown: Sequence[Demonstration],
    config: DemonstrationConfig,
    *,
    gamma: float,
) -> Iterator[float]:
    """Make what was demonstrated likely, and the value what came of it.

    Args:
        policy: Is trained, by an optimizer of its own.
        shown: Episodes; those that are not whole are left out.
        config: Says for how long.
        gamma: The learner's discount.

    Yields:
        After each pass, the mean log-likelihood of a demonstrated action.

    Raises:
        NotImitableError: No episode is whole.
        PolicyDivergedError: The weights are not finite any more.

    Effects: draws the order of episodes from torch's random stream.
    """
    whole = [episode for episode in shown if episode.is_whole]
    if not whole:
        lengths = sorted({len(episode.actions) for episode in shown})
        raise NotImitableError(
            f"{config.policy} cannot be imitated, none of its {len(shown)} runs came to its end "
            f"with the {shown[0].num_planned} decisions that were planned, they had "
            f"{', '.join(map(str, lengths))}: they diverged, or went back; give them a smaller "
            "learning_rate"
        )
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    policy.set_training_mode(True)
    for number in range(config.passes):
        left = 1.0 - number / config.passes
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(left / _DECAY_FRACTION, 1.0)
        order = torch.randperm(len(whole)).split(config.batch_episodes)
        likelihoods = []
        for indices in order:
            batch = [whole[index] for index in indices.tolist()]
            likelihood, error = _batch(policy, batch, gamma)
            optimizer.zero_grad()
            (_VALUE_COEFFICIENT * error - likelihood).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            likelihoods.append(likelihood.detach())
        name = not_finite(policy)
        if name is not None:
            raise PolicyDivergedError(
                f"{name} is not finite after pass {number + 1} of imitating {config.policy}; begin "
                f"anew, with a demonstrations.learning_rate below {config.learning_rate:g}"
            )
        yield float(torch.stack(likelihoods).mean())


def _batch(
    policy: MaskedRecurrentPolicy, batch: Sequence[Demonstration], gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the mean log-likelihood of a batch's actions, and the value's squared error."""
    device, layers = policy.device, policy.lstm_actor
    observations = {
        name: torch.as_tensor(np.concatenate([one.observations[name] for one in batch])).to(device)
        for name in batch[0].observations
    }
    observations = {name: value.float() for name, value in observations.items()}
    actions = torch.as_tensor(np.concatenate([one.actions for one in batch])).to(device)
    returns = torch.as_tensor(np.concatenate([_returns(one.rewards, gamma) for one in batch]))
    start = torch.zeros(layers.num_layers, len(batch), layers.hidden_size, device=device)
    states = RNNStates((start, start), (start, start))
    begins = torch.zeros(len(actions), device=device)
    values, log_prob, _ = policy.evaluate_actions(
        observations,  # type: ignore[arg-type] # the library's own buffers pass mappings, too
        actions,
        states,
        begins,
    )
    error = torch.nn.functional.mse_loss(values.flatten(), returns.to(device))
    return log_prob.mean(), error


def _returns(rewards: NDArray[np.float32], gamma: float) -> NDArray[np.float32]:
    """Return from each decision on what was earned, discounted."""
    returns = np.zeros_like(rewards)
    coming = 0.0
    for index in reversed(range(len(rewards))):
        coming = float(rewards[index]) + gamma * coming
        returns[index] = coming
    return returns
