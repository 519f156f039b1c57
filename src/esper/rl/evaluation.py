"""Policies side by side: what each makes of the same tasks with as many operations."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, ValidationError, model_validator

from esper.experiments.config import RunConfig
from esper.experiments.parts import chosen_policy
from esper.experiments.run import build_setup, prepare
from esper.experiments.settings import SettingsError, explain
from esper.experiments.worker_pool import WorkerDiedError, worker_pool
from esper.lifecycle.events import EventRecord, SeedCommitted, SeedGerminated, SeedPruned
from esper.lifecycle.record import Record
from esper.policies.heuristic import HeuristicPolicy
from esper.policies.learned import LearnedPolicy
from esper.policies.named import is_policy_file
from esper.rl.growth_episode import GrowthEpisode, HostRun
from esper.rl.rewards import RewardConfig
from esper.telemetry.environment import describe_environment

TOLERANCE = 0.03
"""How far a run's operations may lie from the budget: a run has whole epochs."""
_MAX_TRIES = 5

CONFIG_FILE = "evaluation.json"
ENVIRONMENT_FILE = "environment.json"


class EvaluationError(ValueError):
    """An evaluation's folder holds another one, or is damaged; the message says which and why."""


class EvaluationConfig(Record):
    """Which policies are evaluated, and on what."""

    run: RunConfig
    """Of every run but for policy, random seed and, at equal operations, epochs."""
    policies: Annotated[tuple[str, ...], Field(min_length=1)]
    """By name, or as files."""
    random_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Each fixes the host's weights, the order of the data and a policy's own choices."""
    rewards: RewardConfig = RewardConfig()
    budget_of: str = HeuristicPolicy.name
    """The policy whose operations in `run.trainer.epochs` epochs all others get, seed by seed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("policies", self.policies), ("random_seeds", self.random_seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other, got {list(values)}")
        return self

    @property
    def all_policies(self) -> tuple[str, ...]:
        """The policies, the one that sets the budget first."""
        others = tuple(policy for policy in self.policies if policy != self.budget_of)
        return (self.budget_of, *others)


class EvaluatedRun(Record):
    """What a policy made of one run."""

    policy: str
    policy_sha256: str | None
    """Of its file; None of a policy that has a name."""
    random_seed: int
    epochs: int
    steps: int
    flops: float
    """All that the run had to spend: training, seeds that were pruned, probes, deciding."""
    episode_return: float
    """The sum of its rewards."""
    rewards: dict[str, float]
    """By component."""
    diverged: bool
    test: dict[str, float]
    """Of the network as it is in the end, on the test split."""
    param_count: int
    num_germinated: int
    num_committed: int
    num_pruned: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Policy, random seed and epochs."""
        return self.policy, self.random_seed, self.epochs


def play(config: EvaluationConfig, policy: str, random_seed: int, epochs: int) -> EvaluatedRun:
    """Let a policy decide for one run.

    Effects: sets the process's number of threads and matmul precision.
    """
    torch.set_num_threads(config.run.threads or 1)
    torch.manual_seed(random_seed)
    run_config = config.run.model_copy(
        update={
            "policy": policy,
            "random_seed": random_seed,
            "count_flops": True,
            "trainer": config.run.trainer.model_copy(update={"epochs": epochs}),
        }
    )
    setup, decider = build_setup(run_config), chosen_policy(run_config)
    run = prepare(run_config, run_id=f"seed-{random_seed}", setup=setup, policy=decider)
    counted = _Counted()
    run.growth.sinks.append(counted)
    final = setup.selection or setup.validation
    episode = GrowthEpisode(HostRun(trainer=run.trainer, final=final), config.rewards)
    sums: dict[str, float] = {}
    while not episode.over:
        with run.growth.meter.decision():
            actions = decider.decide(episode.state)
        for name, value in episode.play(actions).components.items():
            sums[name] = sums.get(name, 0.0) + value
    flops = run.spent(run.growth.meter.cost).flops
    assert flops is not None
    sha256 = decider.state_dict()["sha256"] if isinstance(decider, LearnedPolicy) else None
    return EvaluatedRun(
        policy=policy,
        policy_sha256=sha256,
        random_seed=random_seed,
        epochs=epochs,
        steps=run.growth.step,
        flops=float(flops),
        episode_return=math.fsum(sums.values()),
        rewards=sums,
        diverged=episode.diverged,
        test=setup.test(),
        param_count=run.param_count(),
        num_germinated=counted.num_germinated,
        num_committed=counted.num_committed,
        num_pruned=counted.num_pruned,
    )


class Evaluation:
    """The finished runs of an evaluation, and which are still to be made.

    Args:
        config: Of the evaluation.
        runs: Finished, in any order.
    """

    def __init__(self, config: EvaluationConfig, runs: Sequence[EvaluatedRun] = ()) -> None:
        self.config = config
        self.runs = {run.key: run for run in runs}

    def add(self, run: EvaluatedRun) -> None:
        """Take a finished run."""
        self.runs[run.key] = run

    def budget(self, random_seed: int) -> float | None:
        """Return the operations that every policy has with this seed; None if not known yet."""
        run = self.runs.get((self.config.budget_of, random_seed, self._epochs))
        return None if run is None else run.flops

    def best(self, policy: str, random_seed: int) -> EvaluatedRun | None:
        """Return the policy's run that comes closest to the budget; None before there is one."""
        budget = self.budget(random_seed)
        runs = self._runs(policy, random_seed)
        if budget is None or not runs:
            return None
        return min(runs, key=lambda run: abs(math.log(run.flops / budget)))

    def missing(self) -> list[tuple[str, int, int]]:
        """Return what can be run now: policy, random seed, epochs."""
        found = []
        for random_seed in self.config.random_seeds:
            for policy in self.config.all_policies:
                epochs = self._next_epochs(policy, random_seed)
                if epochs is not None:
                    found.append((policy, random_seed, epochs))
        return found

    def table(self) -> dict[str, list[EvaluatedRun]]:
        """Return each policy's runs at the budget, by policy, in the order of the seeds."""
        return {
            policy: [
                run
                for random_seed in self.config.random_seeds
                if (run := self.best(policy, random_seed)) is not None
            ]
            for policy in self.config.policies
        }

    @property
    def _epochs(self) -> int:
        return self.config.run.trainer.epochs

    def _runs(self, policy: str, random_seed: int) -> list[EvaluatedRun]:
        return [run for run in self.runs.values() if run.key[:2] == (policy, random_seed)]

    def _next_epochs(self, policy: str, random_seed: int) -> int | None:
        """Return how long to run next, so that it costs the budget; None if it is close enough."""
        budget, runs = self.budget(random_seed), self._runs(policy, random_seed)
        if policy == self.config.budget_of:
            return self._epochs if budget is None else None
        if not runs:
            return self._epochs
        best = self.best(policy, random_seed)
        if best is None or budget is None or len(runs) >= _MAX_TRIES or best.diverged:
            return None
        if abs(best.flops / budget - 1.0) <= TOLERANCE:
            return None
        tried = {run.epochs for run in runs}
        wanted = max(1, round(best.epochs * budget / best.flops))
        return None if wanted in tried else wanted


class EvaluationFolder:
    """Keeps an evaluation: its settings, where it was made, and one file per finished run.

    Args:
        path: Is created; may hold the same evaluation, begun earlier.
        config: Of the evaluation.

    Raises:
        EvaluationError: It holds something else, or an evaluation with other settings.
    """

    def __init__(self, path: Path, config: EvaluationConfig) -> None:
        self.path = path
        self._policies = config.all_policies
        kept = path / CONFIG_FILE
        if holds_evaluation(path):
            if evaluation_config(path) != config:
                raise EvaluationError(
                    f"{path} holds an evaluation with other settings, see {kept}; choose another "
                    "folder, or give the same settings to go on with it"
                )
            return
        if path.exists() and any(path.iterdir()):
            raise EvaluationError(f"{path} is not empty and holds no evaluation")
        path.mkdir(parents=True, exist_ok=True)
        environment = describe_environment(torch.device(config.run.device))
        _write(path / ENVIRONMENT_FILE, json.dumps(environment, indent=2))
        _write(kept, config.model_dump_json(indent=2))

    def runs(self) -> list[EvaluatedRun]:
        """Return all finished runs.

        Raises:
            EvaluationError: A file is damaged.
        """
        runs = []
        for file in sorted(self.path.glob("run-*.json")):
            try:
                runs.append(EvaluatedRun.model_validate_json(file.read_bytes()))
            except ValidationError as error:
                raise EvaluationError(
                    f"{file} is damaged; delete it, and the run is made again: {error}"
                ) from error
        return runs

    def add(self, run: EvaluatedRun) -> None:
        """Keep a finished run."""
        _write(self.path / self.file_of(run), run.model_dump_json(indent=2))

    def file_of(self, run: EvaluatedRun) -> str:
        """Return the name of a run's file; policies that are files of one name have places."""
        place = self._policies.index(run.policy)
        return f"run-{place}-{Path(run.policy).stem}-{run.random_seed}-{run.epochs}.json"


def holds_evaluation(path: Path) -> bool:
    """Return whether an evaluation was begun in a folder."""
    return (path / CONFIG_FILE).exists()


def evaluation_config(path: Path) -> EvaluationConfig:
    """Return the settings of the evaluation in a folder.

    Raises:
        EvaluationError: There is none that this version can read.
    """
    try:
        return EvaluationConfig.model_validate_json((path / CONFIG_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(f"{path} holds no evaluation: {error}") from error


def check_policies(config: EvaluationConfig) -> None:
    """Begin a run of each policy, so that what none could carry out is told before any is made.

    Raises:
        SettingsError: There is no such policy, or it cannot decide for these runs.
        TaskDataError, ModuleNotFoundError: As `esper.experiments.prepare`.

    Effects: sets the process's matmul precision.
    """
    for policy in config.all_policies:
        try:
            run = RunConfig.model_validate({**config.run.model_dump(), "policy": policy})
        except ValidationError as error:
            raise SettingsError(f"{policy}: {explain(error, RunConfig)}") from error
        prepare(run, run_id="check")


def evaluate(
    config: EvaluationConfig,
    folder: EvaluationFolder,
    *,
    processes: int,
    on_run: Callable[[Evaluation, EvaluatedRun], None] = lambda *_: None,
) -> Evaluation:
    """Make every run that is missing, and keep each as soon as it ends.

    Args:
        config: Of the evaluation.
        folder: Where finished runs are, and go.
        processes: How many runs are made at a time.
        on_run: Called with every finished run.

    Raises:
        EvaluationError: A file in the folder is damaged, or a policy's has changed since a run.
        WorkerDiedError: A process was killed; the runs that were finished are kept.
        Exception: What a run raised; policy and seed are in a note.

    Effects: starts processes, and ends them however this ends.
    """
    evaluation = Evaluation(config, folder.runs())
    files = {policy: _sha256(policy) for policy in config.all_policies}
    for kept in evaluation.runs.values():
        _check_file(kept, files, folder)
    running: dict[Future[EvaluatedRun], tuple[str, int, int]] = {}
    with worker_pool(processes) as pool:
        while True:
            waiting = [key for key in evaluation.missing() if key not in running.values()]
            for key in waiting[: processes - len(running)]:
                running[_submit(pool, config, key)] = key
            if not running:
                return evaluation
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for run in _results(ended, running):
                _check_file(run, files, folder)
                folder.add(run)
                evaluation.add(run)
                on_run(evaluation, run)


def _submit(
    pool: ProcessPoolExecutor, config: EvaluationConfig, key: tuple[str, int, int]
) -> Future[EvaluatedRun]:
    try:
        return pool.submit(play, config, *key)
    except BrokenProcessPool as error:  # of another run, which has not been told yet
        raise _worker_died(*key[:2]) from error


def _worker_died(policy: str, random_seed: int) -> WorkerDiedError:
    return WorkerDiedError(
        f"a process was killed, perhaps for want of memory; {policy} with random seed "
        f"{random_seed} was under way. Start again with the same folder to go on"
    )


def _sha256(policy: str) -> str | None:
    if not is_policy_file(policy):
        return None
    try:
        return hashlib.sha256(Path(policy).read_bytes()).hexdigest()
    except OSError as error:
        raise EvaluationError(f"the policy file {policy} cannot be read: {error}") from error


def _check_file(
    run: EvaluatedRun, files: Mapping[str, str | None], folder: EvaluationFolder
) -> None:
    if run.policy_sha256 != files[run.policy]:
        raise EvaluationError(
            f"{run.policy} has changed since {folder.path / folder.file_of(run)} was made with it, "
            "or while that was; evaluate it in another folder"
        )


def _results(
    ended: set[Future[EvaluatedRun]], running: dict[Future[EvaluatedRun], tuple[str, int, int]]
) -> Iterator[EvaluatedRun]:
    for future in sorted(ended, key=lambda future: future.exception() is not None):
        policy, random_seed, epochs = running.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool as error:
            raise _worker_died(policy, random_seed) from error
        except Exception as error:
            error.add_note(f"in the run of {policy}, random seed {random_seed}, {epochs} epochs")
            raise


class _Counted:
    """A sink that counts what became of seeds."""

    def __init__(self) -> None:
        self.num_germinated = self.num_committed = self.num_pruned = 0

    def publish(self, record: EventRecord) -> None:
        self.num_germinated += isinstance(record.event, SeedGerminated)
        self.num_committed += isinstance(record.event, SeedCommitted)
        self.num_pruned += isinstance(record.event, SeedPruned)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass


def _write(file: Path, text: str) -> None:
    """Write a file as a whole: a kill leaves the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
