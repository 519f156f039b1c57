"""Training a policy: rollout by rollout, reported, kept, and gone on with."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, FiniteFloat, model_validator
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.logger import Logger
from torch import nn

from esper.experiments.config import Device
from esper.lifecycle.record import Record
from esper.rl.distributed_ppo import DistributedPPO, Rollout
from esper.rl.fragment_worker import CollectionSettings, MakeEnv, check_spaces
from esper.rl.learner_state import LearnerStates
from esper.rl.training_report import TrainingReport
from esper.rl.workers import Workers
from esper.telemetry.sink import Sink

AtLeastOne = Annotated[int, Field(ge=1)]
Share = Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]
Positive = Annotated[FiniteFloat, Field(gt=0.0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0.0)]

MAY_CHANGE = ("total_steps", "keep_every_rollouts", "device")
"""Settings that a training may go on with other values of."""


class PolicyDivergedError(RuntimeError):
    """Weights of the policy are not finite any more; those that were kept last are."""


def not_finite(policy: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite; None where all are."""
    parameters = policy.named_parameters()
    return next((name for name, values in parameters if not values.isfinite().all()), None)


class PolicyTrainingConfig(Record):
    """How a policy is trained; the defaults are chosen, not tuned."""

    total_steps: AtLeastOne = 20_000
    """Of all environments together; whole rollouts are made until they are reached."""
    num_workers: AtLeastOne = 2
    """Each has one environment."""
    steps_per_fragment: AtLeastOne = 128
    """Of each environment, between two updates of the weights."""
    learning_rate: Positive = 3e-4
    gamma: Annotated[FiniteFloat, Field(gt=0.0, le=1.0)] = 1.0
    """Discount per step; the rewards' own, where shaping is to leave open what is best."""
    gae_lambda: Share = 0.95
    num_epochs: AtLeastOne = 10
    """Passes over each rollout."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    clip_range: Positive = 0.2
    """How far a probability may move, as a fraction of itself."""
    entropy_coefficient: NotNegative = 0.01
    value_coefficient: NotNegative = 0.5
    max_gradient_norm: Positive = 0.5
    target_kl: Positive | None = None
    """Ends the passes over a rollout early; None never does."""
    random_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    keep_every_rollouts: AtLeastOne = 1
    device: Device = "cpu"
    """Where learning computes, cpu, cuda or cuda:N; collecting is on CPUs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = self.steps_per_rollout
        if steps < 2 or steps % self.batch_size == 1:
            raise ValueError(
                f"a rollout has {self.num_workers} x {self.steps_per_fragment} = {steps} steps, "
                f"which leaves a batch of one step when cut into batches of {self.batch_size}, and "
                "advantages are scaled by their spread; choose another batch_size"
            )
        return self

    @property
    def steps_per_rollout(self) -> int:
        """Of all environments, between two updates of the weights."""
        return self.num_workers * self.steps_per_fragment

    @property
    def planned_steps(self) -> int:
        """The steps that are made: whole rollouts, until `total_steps` are reached."""
        return math.ceil(self.total_steps / self.steps_per_rollout) * self.steps_per_rollout

    def collection(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        policy_options: Mapping[str, Any] | None = None,
    ) -> CollectionSettings:
        """Return what the learner and its workers share, for a class of policies."""
        return CollectionSettings(
            policy=policy,
            policy_options=dict(policy_options or {}),
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            random_seed=self.random_seed,
        )


class PolicyTraining:
    """Trains a policy on environments of workers.

    Args:
        config: How.
        settings: From `config.collection`; the workers were made with the same.
        make_env: Is called once, for the spaces.
        workers: Collect; they are not closed here.
        sinks: Take the metrics of each rollout: its number as the epoch, timesteps as the step.
        keep: Folder for the learner's states; None keeps none.

    Raises:
        ValueError: There are more or fewer workers than configured.
        TypeError: Observations are not a `Dict`.

    Effects: as `DistributedPPO`.
    """

    def __init__(
        self,
        config: PolicyTrainingConfig,
        settings: CollectionSettings,
        make_env: MakeEnv,
        workers: Workers,
        *,
        sinks: Iterable[Sink] = (),
        keep: Path | None = None,
    ) -> None:
        if workers.num_workers != config.num_workers:
            raise ValueError(
                f"num_workers is {config.num_workers}, and {workers.num_workers} were made"
            )
        env = make_env()
        observation_space, action_space = check_spaces(env)
        env.close()
        self.config = config
        self.learner = DistributedPPO(
            settings,
            observation_space,
            action_space,
            workers,
            n_steps=config.steps_per_fragment,
            learning_rate=config.learning_rate,
            n_epochs=config.num_epochs,
            batch_size=config.batch_size,
            clip_range=config.clip_range,
            ent_coef=config.entropy_coefficient,
            vf_coef=config.value_coefficient,
            max_grad_norm=config.max_gradient_norm,
            target_kl=config.target_kl,
            device=config.device,
        )
        self.learner.set_logger(Logger(folder=None, output_formats=[]))
        self._workers = workers
        self._sinks = tuple(sinks)
        self._states = None if keep is None else LearnerStates(keep)
        self._problems: list[str] = []

    def resume(self) -> int:
        """Go on from the newest state that was kept; return its timesteps.

        With episodes that end where fragments do, what follows is to the bit what would have
        followed without a break. Else the episodes that were in flight begin anew.

        Raises:
            LearnerStateError: There is none.
            ValueError: It was trained with other settings, or is of another policy.
        """
        if self._states is None:
            raise ValueError(
                "no folder was given to keep states in, so there is none to go on from"
            )
        found = self._states.newest()
        mine, kept = self.config.model_dump(mode="json"), found.info.settings
        other = sorted(
            name
            for name in mine.keys() | kept.keys()
            if name not in MAY_CHANGE and mine.get(name) != kept.get(name)
        )
        if other:
            told = ", ".join(f"{name} {kept.get(name)} (now {mine.get(name)})" for name in other)
            raise ValueError(
                f"the training in {self._states.folder} had {told}; go on with the same settings, "
                "or begin another one elsewhere"
            )
        self.learner.load_state_dict(found.state)
        self._problems += found.damaged
        return self.learner.num_timesteps

    def rollouts(self) -> Iterator[TrainingReport]:
        """Collect and learn until the steps are done, a rollout at a time.

        Raises:
            WorkersFailedError: A worker failed too often in a row.
            PolicyDivergedError: The weights are not finite any more.
        """
        config, learner = self.config, self.learner
        while learner.num_timesteps < config.total_steps:
            started = time.perf_counter()
            known = len(self._workers.problems)
            self._learn()
            seconds = time.perf_counter() - started
            self._problems += self._workers.problems[known:]
            rollout = self.learner.last_rollout
            assert rollout is not None
            self._problems += rollout.problems
            report = self._report(rollout, seconds)
            for sink in self._sinks:
                sink.measure(report.rollout, report.timesteps, report.metrics)
                sink.flush()
            self._keep()  # only now, so that no state is ahead of what was told
            problems, self._problems = tuple(self._problems), []
            yield report.model_copy(update={"problems": problems})

    def _learn(self) -> None:
        try:
            self.learner.learn(self.config.steps_per_rollout, reset_num_timesteps=False)
        except ValueError:  # what comes of weights that are not finite may be refused first
            self._check_weights()
            raise
        self._check_weights()

    def _check_weights(self) -> None:
        name = not_finite(self.learner.policy)
        if name is not None:
            raise PolicyDivergedError(
                f"{name} is not finite after rollout {self.learner.num_rollouts}; begin anew, "
                f"with a learning_rate below {self.config.learning_rate:g} or a "
                f"max_gradient_norm below {self.config.max_gradient_norm:g}"
            )

    def _keep(self) -> None:
        learner, config = self.learner, self.config
        due = learner.num_rollouts % config.keep_every_rollouts == 0
        if self._states is None or not (due or learner.num_timesteps >= config.total_steps):
            return
        try:
            self._states.save(learner, config.model_dump(mode="json"))
        except OSError as error:  # a full disk may have room the next time
            self._problems.append(f"the state was not kept: {error}")

    def _report(self, rollout: Rollout, seconds: float) -> TrainingReport:
        return TrainingReport.of(
            rollout,
            self.learner.logger.name_to_value,
            timesteps=self.learner.num_timesteps,
            total_steps=self.config.total_steps,
            restarts=len(self._workers.problems),
            seconds=seconds,
            steps_per_second=self.config.steps_per_rollout / seconds,
        )
