"""How learning a policy and weighing policies show themselves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

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
from rich.text import Text

from esper.cli.printing import print_json_line
from esper.cli.tables import metric_of
from esper.experiments.comparison.intervals import Interval, mean_interval
from esper.experiments.comparison.words import spread
from esper.policies.named import policy_words
from esper.report.chart import json_values
from esper.report.training_story import RETURN, TrainingStory, several, words_of

if TYPE_CHECKING:
    from esper.rl.evaluation import EvaluatedRun, Evaluation, EvaluationConfig
    from esper.rl.policy_run_config import PolicyRunConfig
    from esper.rl.training_report import TrainingReport

_EVERY_PASSES = 10
_UNBOUNDED = 10_000
"""Columns of a terminal that any table fits."""


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
            print_json_line(self._console, record)


class TrainingView(_View):
    """Shows how far the training of a policy is."""

    def begin(self, config: "PolicyRunConfig", resumed_at: int | None) -> None:
        """Tell what is trained, and where it goes on from."""
        training = config.training
        where = "processes" if config.ray is None else f"Ray actors ({config.ray})"
        self._line(
            f"learning from runs of {config.run.task}, {config.run.trainer.epochs} epochs each: "
            f"{training.planned_steps:,} decisions; {where}: {training.num_workers}"
        )
        if training.planned_steps != training.total_steps:
            self._line(
                f"{training.total_steps:,} were asked for; rollouts are whole, of "
                f"{training.num_workers} x {training.steps_per_fragment} decisions each, and "
                "shorter in a training begun with --set training.steps_per_fragment=N"
            )
        if resumed_at is not None:
            self._line(f"goes on after {resumed_at:,} decisions")
        if self._bar is not None:
            self._bar_task = self._bar.add_task(
                "decisions", total=training.planned_steps, completed=resumed_at or 0
            )

    def imitation(self, number: int, likelihood: float, *, num_left_out: int) -> None:
        """Show a pass over what was demonstrated, and how many episodes were of no use for it."""
        record = {"kind": "imitation", "pass": number, "log_likelihood": likelihood}
        self._json({**record, "episodes_left_out": num_left_out})
        if number == 1 and num_left_out:
            self._line(
                f"{several(num_left_out, 'demonstrated episode')} left out: diverged, or went back"
            )
        if number % _EVERY_PASSES == 0 or number == 1:
            self._line(f"imitating, pass {number}: log-likelihood {likelihood:.3f}")

    def rollout(self, report: "TrainingReport") -> None:
        """Show a rollout."""
        self._json({"kind": "rollout", **report.model_dump(mode="json")})
        for problem in report.problems:
            self._line(problem)
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


def print_training(console: Console, story: TrainingStory) -> None:
    """Print the return at first and by now, by component, as reports of the training have it."""
    if story.first_and_last(RETURN) is None:
        console.print("no episode has ended yet")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("mean over episodes")
    table.add_column(f"first {story.window} of {len(story.rollouts)} rollouts", justify="right")
    table.add_column(f"last {story.window}", justify="right")
    for name in (RETURN, *story.parts):
        words = "return" if name == RETURN else f"  {words_of(name)}"
        table.add_row(words, *(f"{mean:+.4f}" for mean in story.first_and_last(name) or ()))
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

    def run(self, evaluation: "Evaluation", run: "EvaluatedRun") -> None:
        """Show a finished run."""
        self._json({"kind": "run", **run.model_dump(mode="json")})
        config = evaluation.config
        if self._bar is not None:
            waiting = {key[:2] for key in evaluation.missing()}
            known = {run.key[:2] for run in evaluation.runs.values()}
            self._bar.update(self._bar_task, completed=len(known - waiting))
        metric = metric_of(config.run.task, run.test)
        told = f"test loss {run.test['loss']:.4f}"
        if metric != "loss":
            told += f"  {metric} {run.test[metric]:.4f}"
        self._line(
            f"{policy_words(run.policy, config.all_policies):14} seed {run.random_seed}  "
            f"{run.epochs} epochs  {run.flops:.3g} FLOPs  return {run.episode_return:+.4f}  {told}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """What a policy's runs at the budget came to.

    Attributes:
        policy: By name, or as its file.
        label: How tables call it, with its number of random seeds if others have more.
        num_seeds: Of its runs.
        episode_return: Of their rewards.
        test_loss: On the test split.
        metric: The task's own, there; None if that is the loss.
        difference: Of the test loss to that of the policy that sets the budget, seed by seed; None
            of that policy itself.
        param_count: Mean.
        num_germinated: Mean.
        num_committed: Mean.
        epochs: Mean.
        budget_shares: Operations over the budget, least and most.
    """

    policy: str
    label: str
    num_seeds: int
    episode_return: Interval
    test_loss: Interval
    metric: Interval | None
    difference: Interval | None
    param_count: float
    num_germinated: float
    num_committed: float
    epochs: float
    budget_shares: tuple[float, float]


def evaluation_rows(evaluation: "Evaluation") -> list[EvaluationRow]:
    """Return a row per policy that has runs, in order."""
    config, metric = evaluation.config, _metric(evaluation)
    rows = []
    for policy, runs in evaluation.table().items():
        if not runs:
            continue
        budget_runs = [evaluation.best(config.budget_of, run.random_seed) for run in runs]
        pairs = [(run, other) for run, other in zip(runs, budget_runs, strict=True) if other]
        shares = [run.flops / other.flops for run, other in pairs]
        differences = [run.test["loss"] - other.test["loss"] for run, other in pairs]
        rows.append(
            EvaluationRow(
                policy=policy,
                label=_label(config, policy, len(runs)),
                num_seeds=len(runs),
                episode_return=mean_interval([run.episode_return for run in runs]),
                test_loss=mean_interval([run.test["loss"] for run in runs]),
                metric=(
                    None if metric == "loss" else mean_interval([run.test[metric] for run in runs])
                ),
                difference=None if policy == config.budget_of else mean_interval(differences),
                param_count=fmean(run.param_count for run in runs),
                num_germinated=fmean(run.num_germinated for run in runs),
                num_committed=fmean(run.num_committed for run in runs),
                epochs=fmean(run.epochs for run in runs),
                budget_shares=(min(shares), max(shares)),
            )
        )
    return rows


def _metric(evaluation: "Evaluation") -> str:
    measured = [name for run in evaluation.runs.values() for name in run.test]
    return metric_of(evaluation.config.run.task, measured)


def _label(config: "EvaluationConfig", policy: str, num_seeds: int) -> str:
    label, of_seeds = policy_words(policy, config.all_policies), len(config.random_seeds)
    return label if num_seeds == of_seeds else f"{label} ({num_seeds} of {of_seeds} seeds)"


def evaluation_record(evaluation: "Evaluation") -> dict[str, Any]:
    """Return the table as JSON values; what is not known or not finite is null."""
    metric = _metric(evaluation)
    record: dict[str, Any] = json_values(
        {
            "task": evaluation.config.run.task,
            "budget_of": evaluation.config.budget_of,
            "finished": not evaluation.missing(),
            "policies": [_row_record(row, metric) for row in evaluation_rows(evaluation)],
        }
    )
    return record


def _row_record(row: EvaluationRow, metric: str) -> dict[str, Any]:
    """Return a row by its columns, and of how many random seeds it is."""
    least, most = row.budget_shares
    return {
        "policy": row.policy,
        "seeds": row.num_seeds,
        "return": asdict(row.episode_return),
        "test_loss": asdict(row.test_loss),
        **({} if row.metric is None else {metric: asdict(row.metric)}),
        "difference": None if row.difference is None else asdict(row.difference),
        "params": row.param_count,
        "committed": row.num_committed,
        "germinated": row.num_germinated,
        "epochs": row.epochs,
        "flops": {"least": least, "most": most},
    }


def print_evaluation(console: Console, evaluation: "Evaluation") -> None:
    """Print what each policy made of the runs, in as many columns as the terminal has room for."""
    config = evaluation.config
    rows = evaluation_rows(evaluation)
    if not rows:
        console.print("no policy's runs can be compared yet")
        return
    metric = _metric(evaluation)
    table = _evaluation_table(rows, metric, whole=True)
    unbounded = console.options.update(width=_UNBOUNDED)
    if console.measure(table, options=unbounded).maximum > console.width:
        table = _evaluation_table(rows, metric, whole=False)
    console.print(table)
    seeds = len(config.random_seeds)
    other = policy_words(config.budget_of, config.all_policies)
    console.print(
        f"\n{_spread_words(seeds)}; difference: of the test loss to {other}'s. Each policy's runs "
        f"are as long as costs what {other} costs in {config.run.trainer.epochs} epochs, with "
        "probes, pruned seeds and decisions; FLOPs: as shares of that",
        highlight=False,
        markup=False,
    )


def _spread_words(seeds: int) -> str:
    if seeds == 1:
        return "one random seed, which says little"
    return f"mean ± half of the 95 % interval over {seeds} random seeds"


def _evaluation_table(rows: Sequence[EvaluationRow], metric: str, *, whole: bool) -> Table:
    """Return a row per policy; figures are never cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("policy", overflow="fold", min_width=8)
    metrics = [metric] if whole and metric != "loss" else []
    details = ["params", "committed", "epochs"] if whole else []
    head = ("return", "test loss", *metrics, "difference", *details, "FLOPs")
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.budget_shares
        values = {
            "return": spread(row.episode_return, signed=True),
            "test loss": spread(row.test_loss),
            metric: spread(row.metric or row.test_loss),
            "difference": "" if row.difference is None else spread(row.difference, signed=True),
            "params": f"{row.param_count:,.0f}",
            "committed": f"{row.num_committed:.1f} of {row.num_germinated:.1f}",
            "epochs": f"{row.epochs:.1f}",
            "FLOPs": f"{low:.2f}–{high:.2f}",
        }
        table.add_row(Text(row.label), *(values[name] for name in head))
    return table
