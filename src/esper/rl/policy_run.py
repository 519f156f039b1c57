"""The training of a policy on a task: its environments, and the file that it writes."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.lifecycle.events import EnvironmentRestarted, Event, EventRecord, RunFailed
from esper.policies.learned import PolicyFileError, load_policy, save_policy
from esper.rl.demonstrations import demonstrations, imitate
from esper.rl.env import GrowthEnv
from esper.rl.masked_policy import MaskedRecurrentPolicy
from esper.rl.policy_run_config import PolicyRunConfig
from esper.rl.policy_training import PolicyTraining
from esper.rl.task_runs import TaskRuns
from esper.rl.training_report import TrainingReport
from esper.rl.workers import Workers
from esper.telemetry.sink import Sink

POLICY_FILE = "policy.safetensors"


@dataclass(frozen=True)
class MakeGrowthEnv:
    """Makes the environment of a training, in whatever process."""

    config: PolicyRunConfig

    def __call__(self) -> GrowthEnv:
        """Return a fresh environment.

        Effects: sets the process's number of threads to one.
        """
        torch.set_num_threads(1)
        config = self.config
        episodes = config.episodes
        runs = TaskRuns(
            config.run,
            first_random_seed=episodes.first_random_seed,
            num_runs=episodes.num_runs,
            referenced=episodes.referenced,
        )
        return GrowthEnv(
            runs, rewards=config.rewards, choices=config.actions, observation=config.observation
        )


@dataclass(kw_only=True)
class PolicyRun:
    """A training that is open: iterate `imitate`, then `reports`."""

    config: PolicyRunConfig
    folder: Path
    training: PolicyTraining
    workers: Workers
    sinks: Sequence[Sink]
    resumed_at: int | None = None
    """Timesteps that it goes on from; None where it begins."""
    finished: bool = False
    num_left_out: int = 0
    """Demonstrated episodes that were not imitated, as they were not whole."""
    num_told: int = 0
    """How many restarts of environments were told."""

    @property
    def policy_file(self) -> Path:
        """Where the policy is, from the first rollout on."""
        return self.folder / POLICY_FILE

    def imitate(self) -> Iterator[float]:
        """Learn from demonstrations, if there are to be some and nothing was learned yet.

        Yields:
            After each pass, the mean log-likelihood of a demonstrated action.

        Raises:
            NotImitableError: The policy takes actions that the environment does not offer, or none
                of the episodes is whole.
            PolicyDivergedError: The weights are not finite any more.
        """
        config = self.config.demonstrations
        if config is None or self.resumed_at is not None:
            return
        shown = demonstrations(
            config,
            self.config.run,
            MakeGrowthEnv(self.config.demonstrated),
            processes=min(self.config.training.num_workers, os.cpu_count() or 1),
        )
        self.num_left_out = config.num_episodes - sum(episode.is_whole for episode in shown)
        policy = self.training.learner.policy
        assert isinstance(policy, MaskedRecurrentPolicy)
        yield from imitate(policy, shown, config, gamma=self.config.training.gamma)

    def reports(self) -> Iterator[TrainingReport]:
        """Train, a rollout at each step, and write the policy after each.

        Also where no step is left: a training may have been killed before it had written that.

        Raises:
            OSError: The last one's cannot be written; those before are told as problems.
        """
        learned = False
        for report in self.training.rollouts():
            self._tell_restarts(report)
            problems = report.problems
            try:
                self._save(report.mean_return)
            except OSError as error:  # a full disk may have room the next time
                if report.timesteps >= report.total_steps:
                    raise
                problems += (f"the policy was not written: {error}",)
            learned = True
            yield report.model_copy(update={"problems": problems})
        if not learned and not self._is_saved():
            self._save(None)
        self.finished = True

    def tell_failure(self, error: Exception) -> None:
        """Tell what the training ends by."""
        learner = self.training.learner
        event = RunFailed(error=f"{type(error).__name__}: {error}")
        self._publish(event, rollout=learner.num_rollouts, timesteps=learner.num_timesteps)

    def _tell_restarts(self, report: TrainingReport) -> None:
        for problem in self.workers.problems[self.num_told :]:
            self.num_told += 1
            event = EnvironmentRestarted(reason=problem, num_restarts=self.num_told)
            self._publish(event, rollout=report.rollout, timesteps=report.timesteps)

    def _publish(self, event: Event, *, rollout: int, timesteps: int) -> None:
        record = EventRecord(time_seconds=time.time(), epoch=rollout, step=timesteps, event=event)
        for sink in self.sinks:
            sink.publish(record)

    def _is_saved(self) -> bool:
        """Return whether the file holds what was learned so far."""
        try:
            told = load_policy(self.policy_file).trained_on
        except PolicyFileError:
            return False
        return told.get("timesteps") == self.training.learner.num_timesteps

    def _save(self, mean_return: float | None) -> None:
        policy = self.training.learner.policy
        assert isinstance(policy, MaskedRecurrentPolicy)
        run = self.config.run
        save_policy(
            self.policy_file,
            policy.actor(),
            observation=self.config.observation,
            trained_on={
                "task": run.task,
                "epochs": run.trainer.epochs,
                "decision_interval_steps": run.trainer.decision_interval_steps,
                "timesteps": self.training.learner.num_timesteps,
                "mean_return": mean_return,
                "random_seed": self.config.training.random_seed,
            },
        )
