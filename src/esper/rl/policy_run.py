"""Training a policy on a task, in a folder: what is chosen, what is kept, what comes out."""

import difflib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator

from esper.experiments.config import RunConfig, SharedRunConfig, load_run_config
from esper.experiments.parts import usable_device
from esper.experiments.settings import (
    SettingsError,
    explain,
    key_of,
    known_keys,
    merge,
    parse_setting,
    read_settings,
)
from esper.experiments.stored_run import contents, undo
from esper.lifecycle.events import EnvironmentRestarted, EventRecord
from esper.lifecycle.record import Record
from esper.policies.learned import (
    ActionChoices,
    NetworkConfig,
    ObservationConfig,
    PolicyFileError,
    load_policy,
    save_policy,
)
from esper.rl.demonstrations import (
    DemonstrationConfig,
    NotImitableError,
    demonstrations,
    imitate,
)
from esper.rl.env import GrowthEnv
from esper.rl.fragment_worker import CollectionSettings
from esper.rl.learner_state import LearnerStates
from esper.rl.masked_policy import MaskedRecurrentPolicy
from esper.rl.policy_training import PolicyTraining, PolicyTrainingConfig
from esper.rl.process_workers import ProcessWorkers
from esper.rl.ray_workers import RayWorkers
from esper.rl.rewards import RewardConfig
from esper.rl.task_runs import TaskRuns, check_policy
from esper.rl.training_report import TrainingReport
from esper.rl.workers import Workers
from esper.telemetry.environment import describe_environment
from esper.telemetry.run_folder import RunStatus
from esper.telemetry.run_kind import POLICY_TRAINING
from esper.telemetry.run_reader import RunReader
from esper.telemetry.run_store import ReopenedRunStore, RunStore
from esper.telemetry.sink import Sink

POLICY_FILE = "policy.safetensors"
STATES_FOLDER = "learner"

_BEFORE_ALL_STEPS = -1


class EpisodeConfig(Record):
    """Which runs are episodes, and what they are measured against."""

    num_runs: Annotated[int, Field(ge=1)] = 32
    """How many different runs there are, by random seed. They are other ones than those that
    policies are evaluated with by default, 0 to 4, where `first_random_seed` is left as it is."""
    first_random_seed: Annotated[int, Field(ge=0)] = 1000
    referenced: bool = True
    """Whether the return is what growth has brought beyond the same run without it. Runs differ
    more by their seeds than by what is decided; each worker makes each reference once."""


class PolicyRunConfig(Record):
    """Everything that the training of a policy can be told; in config.json of its folder."""

    run: SharedRunConfig
    """Of the runs that are its episodes, but for the random seed."""
    training: PolicyTrainingConfig = PolicyTrainingConfig()
    episodes: EpisodeConfig = EpisodeConfig()
    rewards: RewardConfig = RewardConfig()
    network: NetworkConfig = NetworkConfig()
    observation: ObservationConfig = ObservationConfig()
    actions: ActionChoices = ActionChoices()
    demonstrations: DemonstrationConfig | None = None
    """What is imitated first; None begins with a policy that knows nothing."""
    ray: str | None = None
    """Address of the Ray cluster that the environments run on, "local" for one of this machine;
    None runs them in processes of this machine."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.gamma != self.rewards.gamma:
            raise ValueError(
                f"training.gamma is {self.training.gamma}, and rewards.gamma {self.rewards.gamma}: "
                "shaping leaves what is best as it is with the learner's own discount only; set "
                "both alike"
            )
        if self.rewards.compute_rent > 0.0 and not self.run.count_flops:
            raise ValueError(
                "rewards.compute_rent is paid for operations, which are not counted; add "
                "count_flops=true"
            )
        return self

    @property
    def demonstrated(self) -> Self:
        """The same with the runs that are demonstrated, which follow those that are learned from.

        As many as episodes, since a policy that draws nothing plays a run the same each time.
        """
        episodes, shown = self.episodes, self.demonstrations
        num_runs = 1 if shown is None else shown.num_episodes
        first = episodes.first_random_seed + episodes.num_runs
        return self._with_episodes(num_runs=num_runs, first_random_seed=first)

    @property
    def unreferenced(self) -> Self:
        """The same without references, for an environment that plays nothing."""
        return self._with_episodes(referenced=False)

    def _with_episodes(self, **changes: Any) -> Self:
        episodes = self.episodes.model_copy(update=changes)
        return self.model_copy(update={"episodes": episodes})


SECTIONS = tuple(name for name in PolicyRunConfig.model_fields if name != "run")
"""Of settings; every other key is one of the runs."""


def load_policy_run_config(
    task: str, file: Path | None, settings: Sequence[str], options: Mapping[str, Any]
) -> PolicyRunConfig:
    """Merge the task's defaults, a TOML file, `key=value` settings and options, later ones last.

    A key that begins with one of `SECTIONS` is of the training, any other of its runs. Operations
    are not counted unless asked for, as counting takes time.

    Raises:
        SettingsError: As `esper.experiments.load_run_config`.
    """
    of_runs, mine = _split(settings)
    chosen: dict[str, Any] = {}
    merged: dict[str, Any] = {"training": {"num_workers": os.cpu_count() or 1}}
    if file is not None:
        for key, value in read_settings(file).items():
            _check_section(key)
            merge(merged if key in SECTIONS else chosen, {key: value})
    for setting in of_runs:  # over the file's
        merge(chosen, parse_setting(setting, RunConfig))
    for setting in mine:
        merge(merged, parse_setting(setting, PolicyRunConfig))
    merge(merged, {key: value for key, value in options.items() if key in SECTIONS})
    merge(chosen, {key: value for key, value in options.items() if key not in SECTIONS})
    run = load_run_config(task, None, ["count_flops=false", *of_runs], chosen)
    try:
        return PolicyRunConfig.model_validate({**merged, "run": run})
    except ValidationError as error:
        raise SettingsError(explain(error, PolicyRunConfig)) from error


def _split(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which settings are of the runs, and which of the training."""
    of_runs: list[str] = []
    mine: list[str] = []
    for setting in settings:
        key = key_of(setting)
        _check_section(key)
        (mine if key.split(".")[0] in SECTIONS else of_runs).append(setting)
    return of_runs, mine


def _check_section(key: str) -> None:
    """Raise if a key is neither of a training nor of its runs: each alone knows half of them."""
    sections = {*SECTIONS, *RunConfig.model_fields}
    if key.split(".", maxsplit=1)[0] in sections:
        return
    mine = [name for name in known_keys(PolicyRunConfig) if not name.startswith("run.")]
    known = [*mine, *known_keys(RunConfig), *sections]
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise SettingsError(f"unknown key {key!r}{hint}")


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
    """A training that is open: iterate `reports`, then `finish`."""

    config: PolicyRunConfig
    folder: Path
    training: PolicyTraining
    workers: Workers
    sinks: Sequence[Sink]
    resumed_at: int | None = None
    """Timesteps that it goes on from; None where it begins."""
    finished: bool = False
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
            self._tell(report)
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

    def _tell(self, report: TrainingReport) -> None:
        for problem in self.workers.problems[self.num_told :]:
            self.num_told += 1
            event = EnvironmentRestarted(reason=problem, num_restarts=self.num_told)
            record = EventRecord(
                time_seconds=time.time(), epoch=report.rollout, step=report.timesteps, event=event
            )
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


@contextmanager
def new_policy_run(
    config: PolicyRunConfig, folder: Path, sinks: Sequence[Sink] = ()
) -> Iterator[PolicyRun]:
    """Open a training in a new folder, and close it with a status however it ends.

    Raises:
        RunFolderError: The folder holds a run already.
        SettingsError, TaskDataError, ModuleNotFoundError: The task's runs cannot be made, there is
            no policy to imitate or its settings are not for the task's host, no such device, or no
            Ray; there is no folder then.
        ValueError: The host has no slot, no blueprint fits one, or the Ray cluster is too small;
            there is no folder then.
        ConnectionError: There is no Ray cluster at the address; there is no folder then.
        NotImitableError: The policy to imitate, which plays then, takes actions that the heads do
            not offer; there is no folder any more.
    """
    if config.demonstrations is not None:
        check_policy(config.demonstrations.policy, config.run)
    device = usable_device(config.training.device)
    options = _options(config)
    before = contents(folder)
    with _workers(config, options) as workers:
        store = RunStore(
            folder,
            config=_for_viewers(config),
            environment={
                **describe_environment(device),
                "random_seed": config.training.random_seed,
            },
        )
        try:
            with _closed(store) as done:
                yield (run := _policy_run(config, folder, store, workers, options, sinks))
                done(run)
        except NotImitableError:  # nothing was learned, nothing can go on
            undo(folder, before)
            raise


@contextmanager
def resumed_policy_run(
    folder: Path, sinks: Sequence[Sink] = (), *, total_steps: int | None = None
) -> Iterator[PolicyRun]:
    """Go on with a training that was stopped, from its newest state that is whole.

    One that was stopped before it kept a state begins anew, demonstrations included.

    Args:
        folder: Of the training.
        sinks: Receive every further event and metric, besides the folder.
        total_steps: Up to where; None is as it was begun.

    Raises:
        RunFolderError: It is no folder of a run, or another process writes it.
        SettingsError: It holds no training of a policy, or the task's runs cannot be made.
        LearnerStateError: No state that it kept is whole.
        NotImitableError: As `new_policy_run`; the folder stays.
    """
    config = policy_run_config(folder, total_steps=total_steps)
    usable_device(config.training.device)
    options = _options(config)
    with _workers(config, options) as workers:
        states = LearnerStates(folder / STATES_FOLDER)
        has_learned = bool(states.names())
        after = states.newest().info.num_timesteps if has_learned else _BEFORE_ALL_STEPS
        store = ReopenedRunStore(folder, after_step=after)
        with _closed(store) as done:
            run = _policy_run(config, folder, store, workers, options, sinks)
            run.resumed_at = run.training.resume() if has_learned else None
            yield run
            done(run)


def policy_run_config(folder: Path, *, total_steps: int | None = None) -> PolicyRunConfig:
    """Return the settings of the training in a folder.

    Args:
        folder: Of the training.
        total_steps: Up to where it is to go on; None is as it was begun.

    Raises:
        RunFolderError: It is no folder of a run.
        SettingsError: It holds no training of a policy, or one of another version.
    """
    kept = RunReader(folder).config()
    if POLICY_TRAINING not in kept:
        raise SettingsError(
            f"{folder} holds a run of {kept.get('task')}, and no training of a policy; go on with "
            "it by esper resume"
        )
    try:
        config = PolicyRunConfig.model_validate(kept[POLICY_TRAINING])
    except ValidationError as error:
        raise SettingsError(f"{folder} is of another version: {error}") from error
    if total_steps is None:
        return config
    training = config.training.model_copy(update={"total_steps": total_steps})
    return config.model_copy(update={"training": training})


def _options(config: PolicyRunConfig) -> dict[str, Any]:
    """Return what the policy's class is told, of the task's host."""
    with _threads_put_back():
        env = MakeGrowthEnv(config.unreferenced)()
    blueprints = env.coder.blueprints
    env.close()
    return {"blueprints": blueprints, "choices": config.actions, "network": config.network}


def _settings(config: PolicyRunConfig, options: Mapping[str, Any]) -> CollectionSettings:
    return config.training.collection(MaskedRecurrentPolicy, options)


@contextmanager
def _workers(config: PolicyRunConfig, options: Mapping[str, Any]) -> Iterator[Workers]:
    settings, number = _settings(config, options), config.training.num_workers
    make_env = MakeGrowthEnv(config)
    workers: Workers
    if config.ray is None:
        workers = ProcessWorkers(make_env, settings, num_workers=number)
    else:
        address = None if config.ray == "local" else config.ray
        workers = RayWorkers(make_env, settings, num_workers=number, address=address)
    try:
        with _threads_put_back():
            yield workers
    finally:
        workers.close()


@contextmanager
def _threads_put_back() -> Iterator[None]:
    """Undo what making environments, and playing them here, does to the number of threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _policy_run(
    config: PolicyRunConfig,
    folder: Path,
    store: RunStore,
    workers: Workers,
    options: Mapping[str, Any],
    sinks: Sequence[Sink],
) -> PolicyRun:
    everything = [store, *sinks]
    training = PolicyTraining(
        config.training,
        _settings(config, options),
        MakeGrowthEnv(config.unreferenced),
        workers,
        sinks=everything,
        keep=folder / STATES_FOLDER,
    )
    return PolicyRun(
        config=config, folder=folder, training=training, workers=workers, sinks=everything
    )


@contextmanager
def _closed(store: RunStore) -> Iterator[Callable[[PolicyRun], None]]:
    status: RunStatus = "failed"

    def done(run: PolicyRun) -> None:
        nonlocal status
        status = "finished" if run.finished else "interrupted"

    try:
        yield done
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        store.set_status(status)
        store.close()


def _for_viewers(config: PolicyRunConfig) -> dict[str, Any]:
    """Return settings with what every viewer of run folders looks for."""
    return {
        "task": config.run.task,
        "policy": "being learned",
        "random_seed": config.training.random_seed,
        "learning_rate": config.training.learning_rate,
        POLICY_TRAINING: config.model_dump(mode="json"),
    }
