"""How a comparison shows itself: while it goes on, and as a table."""

from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.cli.printing import print_json_line
from esper.cli.tables import metric_of
from esper.experiments.comparison import (
    ArmSummary,
    CompareConfig,
    Comparison,
    Outcome,
    Outlook,
    RunResult,
    at_equal_flops,
    judge,
    summarise,
)
from esper.experiments.comparison.words import edge_mark, notes, rate, reached, spread
from esper.report.chart import json_values

_OUTCOME_STYLES = {
    Outcome.PAYS: "bold green",
    Outcome.PAYS_PER_STEP: "bold green",
    Outcome.DOES_NOT_PAY: "bold red",
    Outcome.UNDECIDED: "bold yellow",
}
_MEDIUM_COLUMNS, _WIDE_COLUMNS = 120, 190
"""From these widths on the table has more columns, and intervals; the report has them all."""

_BAR_CELLS = 30


class CompareView(Protocol):
    """Shows how far a comparison is."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def change(self, outlook: Outlook, result: RunResult | None) -> None:
        """Show a start, or a finished run."""


class QuietCompareView:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def change(self, outlook: Outlook, result: RunResult | None) -> None:
        """Show nothing."""


class LinesCompareView(QuietCompareView):
    """One line per finished run, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def change(self, outlook: Outlook, result: RunResult | None) -> None:
        """Print a finished run."""
        if result is not None:
            line = f"{_count(outlook)}  {_left(outlook)}  {_finished(result)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class JsonCompareView(QuietCompareView):
    """One JSON object per finished run."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def change(self, outlook: Outlook, result: RunResult | None) -> None:
        """Print a finished run."""
        if result is not None:
            record = {
                "kind": "run",
                "finished": outlook.finished,
                "expected": outlook.expected,
                "seconds_left": outlook.seconds_left,
                "result": result.model_dump(mode="json"),
            }
            print_json_line(self._console, record)


class LiveCompareView(QuietCompareView):
    """A bar with the time left, what is running, and the last finished runs."""

    def __init__(self, console: Console, settings: CompareConfig) -> None:
        self._console = console
        self._task = settings.run.task
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def change(self, outlook: Outlook, result: RunResult | None) -> None:
        """Print a finished run, and renew what stands below."""
        if result is not None:
            self._live.console.print(_finished(result), style="dim", highlight=False, markup=False)
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(outlook.expected, outlook.finished, width=_BAR_CELLS)
        table.add_row(f"comparing {self._task}", bar, _count(outlook), _left(outlook))
        running = ", ".join(f"{r.arm} (seed {r.random_seed})" for r in outlook.running)
        grid = Table.grid()
        grid.add_row(table)
        grid.add_row(Text(f"running: {running}", style="dim"))
        self._live.update(grid)


def _count(outlook: Outlook) -> str:
    return f"{outlook.finished} of about {outlook.expected} runs"


def _left(outlook: Outlook) -> str:
    if outlook.seconds_left is None:
        return "time left not known yet"
    minutes, seconds = divmod(round(outlook.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"about {hours} h {minutes:02} min left"
    return f"about {minutes} min left" if minutes else f"about {seconds} s left"


def _finished(result: RunResult) -> str:
    request = result.request
    return (
        f"{request.arm}, seed {request.random_seed}, rate {request.learning_rate:g}, "
        f"{request.epochs} epochs: test loss {result.test['loss']:.4f}, {result.flops:.3g} FLOPs, "
        f"{result.seconds:.0f} s"
    )


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the table of arms, and the verdict with its reasons."""
    summaries, verdict = summarise(comparison), judge(comparison)
    console.print()
    if summaries:
        console.print(_table(comparison, summaries, width=console.width))
        for note in notes(comparison, summaries, as_shares=True):
            console.print(note, style="dim", highlight=False)
        console.print()
    console.print(verdict.outcome, style=_OUTCOME_STYLES[verdict.outcome], highlight=False)
    for reason in verdict.reasons:
        console.print(f"– {reason}", highlight=False)


def _table(comparison: Comparison, summaries: list[ArmSummary], *, width: int) -> Table:
    """Return a row per arm, with as much of it as the terminal is wide: figures are never cut."""
    metric = metric_of(comparison.config.run.task, summaries[0].metrics)
    medium, wide = width >= _MEDIUM_COLUMNS, width >= _WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("arm", overflow="fold", min_width=8)
    details = ["rate", "params", "steps", "seconds"] if wide else ["params", "seconds"]
    metrics = [f"test {metric}"] if medium and metric != "loss" else []
    relative = ["less static's", "FLOPs to match", *(["time to match"] if wide else [])]
    if all(summary.flops_fraction is None for summary in summaries):
        relative = []
    head = (*(details if medium else ()), "FLOPs", "test loss", *metrics, *relative)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        share, difference = summary.flops_fraction, summary.difference
        values = {
            "rate": rate(summary),
            "params": f"{summary.param_count:,.0f}",
            "steps": f"{summary.steps:,.0f}",
            "seconds": f"{summary.seconds:,.1f}",
            "FLOPs": f"{summary.flops:.3g}" if share is None else f"{share:.3f}",
            "test loss": spread(summary.test_loss) if medium else f"{summary.test_loss.mean:.4f}",
            f"test {metric}": spread(summary.metrics[metric]),
            "less static's": "" if difference is None else spread(difference, signed=True),
            "FLOPs to match": reached(summary, summary.flops_to_static, bounds=wide),
            "time to match": reached(summary, summary.seconds_to_static, bounds=wide),
        }
        label = summary.label(len(comparison.config.random_seeds))
        label += "" if wide else edge_mark(summary)
        table.add_row(Text(label), *(values[name] for name in head))
    return table


def summary_record(comparison: Comparison) -> dict[str, Any]:
    """Return the table, the verdict and its reasons as JSON values; what is not finite is null."""
    verdict = judge(comparison)
    record: dict[str, Any] = json_values(
        {
            "task": comparison.config.run.task,
            "outcome": verdict.outcome.value,
            "reasons": list(verdict.reasons),
            "arms": [asdict(summary) for summary in summarise(comparison)],
            "equal_flops": asdict(at_equal_flops(comparison)),
        }
    )
    return record
