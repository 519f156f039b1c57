"""Tables that several commands print."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.views import WIDE_COLUMNS
from esper.lifecycle.events import CompiledBy, RunFinished, TwinFinished
from esper.lifecycle.words import percent
from esper.report.story import RunStory, SeedStory
from esper.tasks.named import named_task

_COMPILED_BY: dict[CompiledBy, str] = {
    "here": "between two steps",
    "worker": "by another process",
    "store": "long before",
}
_OUTCOME_STYLES = {"committed": "green", "pruned": "red", "still growing": "yellow"}


def metric_of(task: str, measured: Iterable[str]) -> str:
    """Return the metric that tables show of a task.

    What was kept can be looked at without its data and its module: if the task cannot be opened
    here, or measures something else by now, it is the first one that is not the loss.

    Args:
        task: Its name.
        measured: Names of the metrics that there are.
    """
    measured = list(measured)
    with suppress(ValueError, ModuleNotFoundError):
        metric = named_task(task).metric
        if metric in measured:
            return metric
    return next((name for name in measured if name != "loss"), "loss")


def print_seeds(console: Console, story: RunStory, *, why_none: str | None = None) -> None:
    """Print what each seed contributed and why it ended as it did: a table, or lines if narrow.

    Args:
        console: To print to.
        story: Of the run.
        why_none: What is said of a run in which nothing germinated; None if that is not known.
    """
    if not story.seeds:
        told = "nothing germinated" if why_none is None else f"nothing germinated: {why_none}"
        console.print(told, highlight=False)
    elif console.width >= WIDE_COLUMNS:
        console.print(_seeds_table(story))
    else:
        for seed in story.seeds:
            saved = percent(seed.contribution_fraction)
            line = Text(f"{seed.slot}: {seed.blueprint} +{seed.param_count:,}, {_span(seed)}: ")
            line.append(seed.outcome, style=_OUTCOME_STYLES[seed.outcome])
            line.append(f"{', saves ' + saved if saved else ''}; {seed.reason}")
            console.print(line)
    linear = sum(seed.refused_as_linear for seed in story.seeds)
    if linear and not any(seed.committed for seed in story.seeds):
        console.print(
            f"\nnothing was committed, and {linear} of {len(story.seeds)} seeds were refused for "
            "being little more than a linear map, which the host's own layers can learn; where "
            "seeds become useful only later, ask for less: --set "
            "slot.thresholds.max_linear_share=1 --set "
            "slot.thresholds.min_over_linear_fraction=none",
            style="yellow",
            highlight=False,
        )


def _seeds_table(story: RunStory) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("slot", "seed"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column(f"{story.unit}s", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for seed in story.seeds:
        table.add_row(
            seed.slot,
            seed.blueprint,
            f"{seed.param_count:,}",
            _span(seed),
            Text(seed.outcome, style=_OUTCOME_STYLES[seed.outcome]),
            percent(seed.contribution_fraction),
            seed.reason,
        )
    return table


def networks_table(rows: Mapping[str, tuple[int, Mapping[str, float]]]) -> Table:
    """Return networks side by side: name to parameters and test metrics."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("network")
    table.add_column("params", justify="right")
    metrics = list(dict.fromkeys(name for _, values in rows.values() for name in values))
    for name in metrics:
        table.add_column(f"test {name}", justify="right")
    for name, (params, values) in rows.items():
        cells = [f"{values[metric]:.4f}" if metric in values else "" for metric in metrics]
        table.add_row(name, f"{params:,}", *cells)
    return table


def print_compiled(console: Console, story: RunStory) -> None:
    """Print how many seeds ran compiled, and what to do if none was ready in its time."""
    ready, seeds = [seed for seed in story.seeds if seed.compiled], len(story.seeds)
    if not ready and seeds > 0:
        console.print(
            "no seed ran compiled: none was ready before it ended, or compiling failed; esper "
            "compile does it before a run, told the run's threads (--threads 1 for bundled tasks), "
            "and --set compile.ahead=false waits for the compiler",
            style="yellow",
            highlight=False,
        )
        return
    counts = Counter(seed.compiled[0].source for seed in ready)
    told = ", ".join(
        f"{counts[source]} {words}" for source, words in _COMPILED_BY.items() if counts[source]
    )
    held_up = sum(event.milliseconds for seed in ready for event in seed.compiled) / 1e3
    console.print(
        f"compiled     {len(ready)} of {seeds} seeds ({told}); held up {held_up:.1f} s in all"
        if ready
        else "compiled     the host; nothing germinated",
        highlight=False,
    )


def print_twin(console: Console, grown: RunFinished, twin: TwinFinished) -> None:
    """Print whether the run ended better than its twin, and what that can tell."""
    loss, other = grown.metrics["loss"], twin.metrics["loss"]
    if not (math.isfinite(loss) and math.isfinite(other)):
        verdict = Text("whether growth paid in this run cannot be told", style="yellow")
    elif loss < other:
        verdict = Text("growth paid in this run", style="green")
    else:
        verdict = Text("growth did not pay in this run", style="red")
    verdict.append(f": test loss {loss:.4f}, its twin's {other:.4f}", style="not bold")
    if other and math.isfinite(loss - other):
        verdict.append(f" ({percent((loss - other) / abs(other))})")
    console.print(verdict)
    console.print(
        f"the twin never grew, the same run up to step {twin.shared_steps:,}, and had "
        f"{twin.epochs} epochs for {twin.flops_fraction:.2f} of the run's operations; one random "
        "seed is no proof, and other sizes were not tried: esper compare does both",
        style="dim",
        highlight=False,
    )


def _span(seed: SeedStory) -> str:
    return f"{seed.epoch}–{seed.end_epoch}" if seed.end_epoch is not None else f"{seed.epoch}–"
