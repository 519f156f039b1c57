"""How learning a policy and weighing policies show themselves."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from esper.experiments.comparison.intervals import mean_interval
from esper.experiments.comparison.words import spread
from esper.policies.named import is_policy_file
from esper.tasks.named import named_task

if TYPE_CHECKING:
    from esper.rl.evaluation import Evaluation, EvaluationConfig, PolicyRun
    from esper.rl.policy_run import PolicyRunConfig
    from esper.rl.training_report import TrainingReport

_WINDOW_ROLLOUTS = 5
_EVERY_PASSES = 10


class _View:
    """A bar in a terminal, lines elsewhere, JSON lines or nothing where that is asked for."""

    def __init__(self, console: Console, *, quiet: bool, as_json: bool) -> None:
        self._console = console
        self._quiet, self._as_json = quiet, as_json
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        if console.is_terminal and not (quiet or as_json):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        if not (self._quiet or self._as_json):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _json(self, record: object) -> None:
        if self._as_json:
            self._console.out(json.dumps(record), highlight=False)


class TrainingView(_View):
    """Shows how far the training of a policy is."""

    def begin(self, config: "PolicyRunConfig", resumed_at: int | None) -> None:
        """Tell what is trained, and where it goes on from."""
        training = config.training
        where = "processes" if config.ray is None else f"Ray actors ({config.ray})"
        self._line(
            f"learning from runs of {config.run.task}, {config.run.trainer.epochs} epochs each, in "
            f"{training.num_workers} {where}: {training.total_steps:,} decisions"
        )
        if resumed_at is not None:
            self._line(f"goes on after {resumed_at:,} decisions")
        if self._bar is not None:
            self._bar_task = self._bar.add_task(
                "decisions", total=training.total_steps, completed=resumed_at or 0
            )

    def imitation(self, number: int, likelihood: float) -> None:
        """Show a pass over what was demonstrated."""
        self._json({"kind": "imitation", "pass": number, "log_likelihood": likelihood})
        if number % _EVERY_PASSES == 0 or number == 1:
            self._line(f"imitating, pass {number}: log-likelihood {likelihood:.3f}")

    def rollout(self, report: "TrainingReport") -> None:
        """Show a rollout."""
        self._json({"kind": "rollout", **json.loads(report.model_dump_json())})
        for problem in report.problems:
            self._line(f"started again: {problem}")
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=report.timesteps)
        self._line(rollout_line(report))


def rollout_line(report: "TrainingReport") -> str:
    """Return a rollout in a line."""
    told = f"{report.timesteps:>8,} decisions  {report.steps_per_second:6.1f}/s"
    if report.mean_return is not None:
        told += f"  return {report.mean_return:+.4f} over {report.episodes} episodes"
    final = {name: value for name, value in report.final.items() if name != "return"}
    told += "".join(f"  {name} {value:.4g}" for name, value in final.items())
    return f"{told}  entropy {report.entropy:.2f}  KL {report.approx_kl:.4f}"


def print_training(console: Console, reports: Sequence["TrainingReport"]) -> None:
    """Print the return at the begin and at the end, by component."""
    told = [report for report in reports if report.mean_return is not None]
    if not told:
        console.print("no episode has ended yet")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("mean over episodes")
    window = min(_WINDOW_ROLLOUTS, max(1, len(told) // 2))
    table.add_column(f"first {window} rollouts", justify="right")
    table.add_column(f"last {window}", justify="right")
    first, last = told[:window], told[-window:]

    def row(name: str, values: Sequence[Sequence[float]]) -> None:
        table.add_row(name, *(f"{sum(some) / len(some):+.4f}" for some in values))

    row("return", [[r.mean_return or 0.0 for r in some] for some in (first, last)])
    for part in told[-1].return_parts:
        row(f"  {part}", [[r.return_parts.get(part, 0.0) for r in some] for some in (first, last)])
    console.print(table)


class EvaluationView(_View):
    """Shows how far an evaluation is."""

    def __init__(
        self, console: Console, config: "EvaluationConfig", *, quiet: bool, as_json: bool
    ) -> None:
        super().__init__(console, quiet=quiet, as_json=as_json)
        self._num_finished = 0
        if self._bar is not None:
            runs = len(config.all_policies) * len(config.random_seeds)
            self._bar_task = self._bar.add_task("policies and seeds", total=runs)

    def run(self, evaluation: "Evaluation", run: "PolicyRun") -> None:
        """Show a finished run."""
        self._json({"kind": "run", **json.loads(run.model_dump_json())})
        config = evaluation.config
        if self._bar is not None:
            waiting = {key[:2] for key in evaluation.missing()}
            known = {run.key[:2] for run in evaluation.runs.values()}
            self._bar.update(self._bar_task, completed=len(known - waiting))
        metric = named_task(config.run.task).metric
        self._line(
            f"{policy_words(run.policy):14} seed {run.random_seed}  {run.epochs} epochs  "
            f"{run.flops:.3g} FLOPs  return {run.episode_return:+.4f}  test loss "
            f"{run.test['loss']:.4f}  {metric} {run.test[metric]:.4f}"
        )


def policy_words(policy: str) -> str:
    """Return how a table calls a policy."""
    return Path(policy).stem if is_policy_file(policy) else policy


def evaluation_rows(evaluation: "Evaluation") -> tuple[list[str], list[list[str]]]:
    """Return the table of an evaluation: names of its columns, and a row per policy."""
    metric = named_task(evaluation.config.run.task).metric
    names = ["policy", "return", "test loss", f"test {metric}", "less budget policy's loss"]
    names += ["parameters", "germinated", "committed", "epochs", "FLOPs, of the budget"]
    rows = []
    budget_runs = {
        seed: evaluation.best(evaluation.config.budget_of, seed)
        for seed in evaluation.config.random_seeds
    }
    for policy, runs in evaluation.table().items():
        if not runs:
            continue
        base = [budget_runs[run.random_seed] for run in runs]
        less = [
            run.test["loss"] - other.test["loss"]
            for run, other in zip(runs, base, strict=True)
            if other is not None
        ]
        flops = [run.flops / (evaluation.budget(run.random_seed) or 1.0) for run in runs]
        own = policy == evaluation.config.budget_of

        def mean(values: Sequence[float], digits: int) -> str:
            return f"{sum(values) / len(values):,.{digits}f}"

        rows.append(
            [
                policy_words(policy),
                spread(mean_interval([run.episode_return for run in runs]), signed=True),
                spread(mean_interval([run.test["loss"] for run in runs])),
                spread(mean_interval([run.test[metric] for run in runs])),
                "" if own else spread(mean_interval(less), signed=True),
                mean([run.param_count for run in runs], 0),
                mean([run.num_germinated for run in runs], 1),
                mean([run.num_committed for run in runs], 1),
                mean([run.epochs for run in runs], 1),
                f"{min(flops):.2f}–{max(flops):.2f}",
            ]
        )
    return names, rows


def print_evaluation(console: Console, evaluation: "Evaluation") -> None:
    """Print what each policy made of the runs."""
    names, rows = evaluation_rows(evaluation)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    seeds = len(evaluation.config.random_seeds)
    console.print(
        f"\nmean ± half of the 95 % interval over {seeds} random seeds; each policy's runs are as "
        f"long as costs what {policy_words(evaluation.config.budget_of)} costs in "
        f"{evaluation.config.run.trainer.epochs} epochs, with probes, pruned seeds and decisions",
        highlight=False,
    )
