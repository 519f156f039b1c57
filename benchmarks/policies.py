"""Who decides best? Every policy on the same runs with as many operations, a learned one too.

For each task a policy is trained first, by recurrent PPO. Its runs are other ones, by random seed,
than those that all policies are then weighed on. What was trained or weighed before is taken from
the folder, and goes on there if it was stopped.

    python benchmarks/policies.py [--tasks digits text] [--folder benchmarks/results]
        [--processes N] [--seeds 5] [--quick]
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from esper.cli.policy_views import print_evaluation
from esper.experiments.comparison.intervals import mean_interval
from esper.experiments.comparison.words import spread
from esper.policies.named import NEVER
from esper.rl.evaluation import (
    EvaluatedRun,
    Evaluation,
    EvaluationConfig,
    EvaluationFolder,
    evaluate,
)
from esper.rl.policy_run import POLICY_FILE
from esper.rl.policy_run_config import load_policy_run_config, policy_run_config
from esper.rl.stored_policy_run import new_policy_run, resumed_policy_run
from esper.telemetry.run_reader import RunReader
from objective_tables import machine

POLICIES = (NEVER, "random", "schedule", "heuristic", "ucb1")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A task, how long its runs are, and how a policy learns it.

    Attributes:
        settings: Of all runs.
        decisions: To learn from.
        training: Settings of the training, and of its runs where they differ.
    """

    task: str
    settings: tuple[str, ...]
    decisions: int
    training: tuple[str, ...]


CONTESTS = {
    contest.task: contest
    for contest in (
        Contest(
            task="digits",
            settings=("trainer.epochs=40",),
            decisions=7_680,
            training=(
                "trainer.epochs=20",
                "observation.loss=training",
                "demonstrations.policy=schedule",
                "demonstrations.num_episodes=32",
                "demonstrations.passes=50",
                "training.steps_per_fragment=320",
                "training.batch_size=320",
                "training.num_epochs=6",
                "training.learning_rate=0.0002",
                "training.target_kl=0.02",
                "rewards.progress=0",
                "rewards.potential=none",
                "training.gae_lambda=1.0",
            ),
        ),
        Contest(
            task="text",
            settings=("trainer.epochs=14",),
            decisions=672,
            training=(
                "trainer.epochs=7",
                "count_flops=true",
                "observation.loss=training",
                "demonstrations.policy=none",
                "demonstrations.num_episodes=16",
                "demonstrations.passes=50",
                "training.steps_per_fragment=28",
                "training.batch_size=28",
                "training.num_epochs=6",
                "training.learning_rate=0.0002",
                "training.target_kl=0.02",
                "rewards.compute_rent=0.25",
                "rewards.progress=0",
                "rewards.potential=none",
                "training.gae_lambda=1.0",
            ),
        ),
    )
}
_LEARNING = ("training.entropy_coefficient=0.0", "episodes.num_runs=16")
_QUICK = (
    "trainer.epochs=2",
    "trainer.decision_interval_steps=none",
    "training.steps_per_fragment=2",
    "training.batch_size=2",
    "training.num_workers=1",
    "episodes.num_runs=1",
)
_QUICK_DEMONSTRATIONS = ("demonstrations.num_episodes=1", "demonstrations.passes=1")


def train(contest: Contest, folder: Path, *, processes: int, quick: bool) -> Path:
    """Return the file of the task's learned policy, trained first if it is not there."""
    if (folder / "config.json").exists():
        if RunReader(folder).status == "finished":
            policy_run_config(folder)
            return folder / POLICY_FILE
        opened = resumed_policy_run(folder)
    else:
        settings = [*contest.settings, *contest.training, *_LEARNING]
        settings += [f"training.num_workers={processes}"]
        if quick:
            imitates = any(setting.startswith("demonstrations.") for setting in settings)
            settings += [*_QUICK, *(_QUICK_DEMONSTRATIONS if imitates else ())]
        steps = 2 if quick else contest.decisions
        options = {"training": {"total_steps": steps}}
        opened = new_policy_run(
            load_policy_run_config(contest.task, None, settings, options), folder
        )
    with opened as run:
        for likelihood in run.imitate():
            print(f"{contest.task}: imitated with a log-likelihood of {likelihood:.3f}")
        for report in run.reports():
            print(f"{contest.task}: {report.timesteps} decisions, return {report.mean_return}")
        return run.policy_file


def weigh(
    contest: Contest, learned: Path, folder: Path, *, seeds: int, processes: int, quick: bool
) -> Evaluation:
    """Return what each policy made of the task's runs."""
    settings = [*contest.settings, *(("trainer.epochs=2",) if quick else ())]
    run = load_policy_run_config(contest.task, None, settings, {}).run
    config = EvaluationConfig(
        run=run.model_copy(update={"count_flops": True}),
        policies=(*POLICIES, str(learned)),
        random_seeds=tuple(range(seeds)),
    )

    def tell(_: Evaluation, done: EvaluatedRun) -> None:
        print(f"{contest.task}: {done.policy}, seed {done.random_seed}, {done.epochs} epochs")

    kept = EvaluationFolder(folder, config)
    return evaluate(config, kept, processes=processes, on_run=tell)


def show(console: Console, contest: Contest, evaluation: Evaluation) -> None:
    console.print(f"\n{contest.task}, {' '.join(contest.settings)}\n", markup=False)
    print_evaluation(console, evaluation)
    *others, learned = evaluation.table().values()
    console.print("\nthe learned policy's less another's, seed by seed:")
    for runs in others:
        pairs = list(zip(learned, runs, strict=True))
        returns = mean_interval([one.episode_return - other.episode_return for one, other in pairs])
        losses = mean_interval([one.test["loss"] - other.test["loss"] for one, other in pairs])
        console.print(
            f"{runs[0].policy:10} return {spread(returns, signed=True)}, "
            f"test loss {spread(losses, signed=True)}",
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(CONTESTS), choices=list(CONTESTS))
    parser.add_argument("--folder", type=Path, help="default benchmarks/results; kept")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a run of each, to see that it works")
    arguments = parser.parse_args()
    console = Console(width=200)
    console.print(machine())
    how = {"processes": arguments.processes, "quick": arguments.quick}
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary) if arguments.quick else Path("benchmarks/results")
        for task in arguments.tasks:
            contest, place = CONTESTS[task], arguments.folder or kept
            learned = train(contest, place / f"policy-{task}", **how)
            place /= f"policy-eval-{task}"
            show(console, contest, weigh(contest, learned, place, seeds=arguments.seeds, **how))


if __name__ == "__main__":
    main()
