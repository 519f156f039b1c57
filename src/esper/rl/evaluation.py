"""Policies side by side: what each makes of the same tasks with as many operations."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator

from esper.experiments.config import RandomSeed, SharedRunConfig
from esper.experiments.parts import chosen_policy
from esper.experiments.run import build_setup, least_epochs, prepare
from esper.experiments.seed_counts import SeedCounts
from esper.experiments.series_folder import SeriesFiles, SeriesFolder
from esper.experiments.worker_pool import make_missing
from esper.lifecycle.record import Record
from esper.policies.heuristic import HeuristicPolicy
from esper.policies.learned import LearnedPolicy
from esper.rl.growth_episode import DivergedAtOnceError, GrowthEpisode, HostRun
from esper.rl.rewards import RewardConfig, divergence_penalty
from esper.rl.task_runs import check_policy
from esper.telemetry.run_kind import EVALUATION_FILE
from esper.training.policy import Policy

TOLERANCE = 0.03
"""How far a run's operations may lie from the budget: a run has whole epochs."""
_MAX_TRIES = 5


class EvaluationConfig(Record):
    """Which policies are evaluated, and on what."""

    run: SharedRunConfig
    """Of every run but for policy, random seed and, at equal operations, epochs."""
    policies: Annotated[tuple[str, ...], Field(min_length=1)]
    """By name, or as files."""
    random_seeds: Annotated[tuple[RandomSeed, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
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

    Effects: sets the process's number of threads and matmul precision, seeds its random streams.
    """
    torch.set_num_threads(config.run.threads or 1)
    run_config = config.run.model_copy(
        update={
            "policy": policy,
            "random_seed": random_seed,
            "count_flops": True,
            "trainer": config.run.trainer.model_copy(update={"epochs": epochs}),
        }
    )
    setup, decider = build_setup(run_config), chosen_policy(run_config)
    run = prepare(run_config, setup=setup, policy=decider)
    counts = SeedCounts()
    run.growth.sinks.append(counts)
    final = setup.selection or setup.validation
    sums, diverged = _played(HostRun(trainer=run.trainer, final=final), decider, config.rewards)
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
        diverged=diverged,
        test=dict(run.judged(setup.test)),
        param_count=run.param_count(),
        num_germinated=counts.num_germinated,
        num_committed=counts.num_committed,
        num_pruned=counts.num_pruned,
    )


def _played(run: HostRun, policy: Policy, rewards: RewardConfig) -> tuple[dict[str, float], bool]:
    """Let a policy decide to the end; return the sums of rewards, and whether the run diverged."""
    try:
        episode = GrowthEpisode(run, rewards)
    except DivergedAtOnceError:  # that ends a run, and no evaluation
        return {"diverged": divergence_penalty(rewards, math.nan)}, True
    sums: dict[str, float] = {}
    while not episode.over:
        with run.trainer.growth.meter.decision():
            actions = policy.decide(episode.state)
        for name, value in episode.play(actions).components.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums, episode.diverged


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
        least = least_epochs(self.config.run, round(best.steps * self._epochs / best.epochs))
        wanted = max(least, round(best.epochs * budget / best.flops))
        return None if wanted in tried else wanted


_FILES = SeriesFiles(
    noun="evaluation",
    config=EvaluationConfig,
    config_file=EVALUATION_FILE,
    run=EvaluatedRun,
    run_files="run-*.json",
)


class EvaluationFolder(SeriesFolder[EvaluationConfig, EvaluatedRun]):
    """Keeps an evaluation.

    Args:
        path: Is created; may hold the same evaluation, begun earlier.
        config: Of the evaluation.

    Raises:
        SeriesFolderError, SettingsError: As `SeriesFolder`.
    """

    def __init__(self, path: Path, config: EvaluationConfig) -> None:
        self._policies = config.all_policies
        super().__init__(_FILES, path, config, device=config.run.device, policies=self._policies)

    def file_of(self, run: EvaluatedRun) -> Path:
        """Return where a run is kept; policies that are files of one name have places."""
        place, name = self._policies.index(run.policy), Path(run.policy).stem
        return self.path / f"run-{place}-{name}-{run.random_seed}-{run.epochs}.json"

    def made_with(self, run: EvaluatedRun) -> tuple[str, str | None]:
        """Return the policy that decided in a run, and the SHA-256 of its file if it has one."""
        return run.policy, run.policy_sha256

    def is_complete(self, runs: Sequence[EvaluatedRun]) -> bool:
        """Return whether no run is missing besides these."""
        return not Evaluation(self.config, runs).missing()


def holds_evaluation(path: Path) -> bool:
    """Return whether an evaluation was begun in a folder."""
    return _FILES.begun_in(path)


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation in a folder as far as it has come, whatever machine made it.

    Raises:
        SeriesFolderError: There is none, a file is damaged, or of another version.
    """
    return Evaluation(_FILES.config_of(path), _FILES.runs_in(path))


def check_policies(config: EvaluationConfig) -> None:
    """Begin a run of each policy, so that what none could carry out is told before any is made.

    Raises:
        SettingsError: There is no such policy, or it cannot decide for these runs.
        TaskDataError, ModuleNotFoundError: As `esper.experiments.prepare`.

    Effects: sets the process's matmul precision.
    """
    for policy in config.all_policies:
        check_policy(policy, config.run)


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
        SeriesFolderError: Another process makes them, a file in the folder is damaged, or a
            policy's has changed.
        WorkerDiedError, Exception: As `make_missing`.

    Effects: starts processes, and ends them however this ends.
    """
    with folder.making_runs() as finished:
        evaluation = Evaluation(config, finished)

        def keep(_: object, run: EvaluatedRun) -> None:
            folder.add(run)
            evaluation.add(run)
            on_run(evaluation, run)

        make_missing(
            evaluation.missing,
            lambda pool, key: pool.submit(play, config, *key),
            keep=keep,
            describe=lambda key: "{}, random seed {}, {} epochs".format(*key),
            processes=processes,
        )
    return evaluation
