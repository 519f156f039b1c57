"""What benchmarks/seed_objective.py shows of its runs."""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import esper
from objective_hosts import OPTIMIZERS, HostCase
from objective_runs import Result, Run, Start

T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 9: 2.31, 10: 2.26, 15: 2.14, 20: 2.09, 30: 2.05}
"""Two-sided 95 % of Student's distribution, by number of values; between two, that of the lower."""

BLOCK_STEPS = 20

Rows = list[list[str]]


def show(console: Console, header: Sequence[str], rows: Rows, *, markdown: bool) -> None:
    """Print rows as a table, or as Markdown."""
    if markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
        lines.insert(1, "|" + "---|" * len(header))
        console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
        return
    table = Table(box=None, header_style="dim")
    for column in header:
        table.add_column(column, justify="left" if column in ("cell", "arm") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def machine() -> str:
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; esper {esper.__version__}"
    )


def by_cell(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, list[Result]]]:
    """Return the runs by host and optimizer, then by arm."""
    cells: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        arms = cells.setdefault((result.host, result.optimizer), {})
        arms.setdefault(result.arm, []).append(result)
    return cells


def ratios(arm: Sequence[Result], none: Sequence[Result]) -> list[float]:
    """Return final losses over those of `none`, paired by seed."""
    base = {result.seed: result.final_loss for result in none}
    return [result.final_loss / base[result.seed] for result in arm]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half its 95 % interval."""
    count = len(values)
    if count < 2:
        return values[0], 0.0
    error = statistics.stdev(values) / count**0.5
    quantile = T_QUANTILES[max(known for known in T_QUANTILES if known <= count)]
    return statistics.mean(values), quantile * error


def peak(run: Result, none: Sequence[Result]) -> float:
    """Return the run's highest loss while BLENDING over that of the host alone in those steps."""
    (base,) = (result for result in none if result.seed == run.seed)
    alone = dict(base.trace)
    return max(loss for _, loss in run.trace) / max(alone[step] for step, _ in run.trace)


def verdict(ratio: float, margin: float) -> str:
    if not ratio < float("inf"):
        return "diverged"
    if ratio - margin > 1.0:
        return "worse"
    return "better" if ratio + margin < 1.0 else "same"


def mean(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "–"  # nan shows as nan


def outcome_table(console: Console, results: Sequence[Result], *, markdown: bool) -> None:
    """Print one line per host, optimizer and arm."""
    rows: Rows = []
    for (host, optimizer), arms in by_cell(results).items():
        none = arms["none"]
        rows.append([f"{host}, {optimizer}", "none", *[""] * 6, _loss(none), ""])
        for arm, runs in arms.items():
            if arm == "none":
                continue
            ratio, margin = interval(ratios(runs, none))
            peaks = [peak(run, none) for run in runs if run.trace]
            rows.append(
                [
                    "",
                    arm,
                    mean([run.residual for run in runs], 2),
                    mean([run.full_alpha for run in runs]),
                    mean([run.best_amplitude_loss for run in runs]),
                    f"{sum(run.blended for run in runs)}/{len(runs)}",
                    f"{sum(run.committed for run in runs)}/{len(runs)}",
                    f"{statistics.mean(peaks):.2f} ({max(peaks):.2f})" if peaks else "–",
                    f"{ratio:.3f} ± {margin:.3f}",
                    verdict(ratio, margin),
                ]
            )
    header = ("cell", "arm", "‖u‖/‖h‖", "full alpha", "best a", "G2", "kept", "peak", "final", "")
    show(console, header, rows, markdown=markdown)


def _loss(runs: Sequence[Result]) -> str:
    return f"loss {statistics.mean(run.final_loss for run in runs):.4f}"


def summary_table(console: Console, results: Sequence[Result], *, markdown: bool) -> None:
    """Print one line per arm: final loss over that of `none`, by host and over all runs."""
    cells = by_cell(results)
    hosts = list(dict.fromkeys(host for host, _ in cells))
    arms = [arm for arm in next(iter(cells.values())) if arm != "none"]
    rows: Rows = []
    for arm in arms:
        row, everywhere, verdicts = [arm], [], []
        for host in hosts:
            own: list[float] = []
            for (name, _), found in cells.items():
                if name == host:
                    values = ratios(found[arm], found["none"])
                    own += values
                    verdicts.append(verdict(*interval(values)))
            everywhere += own
            row.append(_with_margin(own))
        counts = [verdicts.count(word) for word in ("better", "same", "worse", "diverged")]
        rows.append([*row, _with_margin(everywhere), " / ".join(map(str, counts))])
    header = ("arm", *hosts, "all", "cells better / same / worse / diverged")
    show(console, header, rows, markdown=markdown)


def _with_margin(values: Sequence[float]) -> str:
    middle, margin = interval(values)
    return f"{middle:.3f} ± {margin:.3f}"


def cost_table(
    console: Console, hosts: Sequence[HostCase], arms: Sequence[str], steps: int, *, markdown: bool
) -> None:
    """Print a step's cost while the seed learns, every arm in turn after every other."""
    rows: Rows = []
    for case in hosts:
        start = Start(case, "AdamW", 0, BLOCK_STEPS)
        runs = {arm: Run(start, arm, "behind") for arm in arms}
        for run in runs.values():
            run.growth.after_epoch(run.validation)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for step in range(steps + BLOCK_STEPS):
            order = arms if step % 2 else tuple(reversed(arms))
            for arm in order:
                started = time.perf_counter()
                runs[arm].step()
                if step >= BLOCK_STEPS:
                    times[arm].append(time.perf_counter() - started)
        row = [case.name, f"{1e3 * statistics.median(times['none']):.2f}"]
        row += [_ratio(times[arm], times["none"]) for arm in arms if arm != "none"]
        rows.append(row)
    header = ("cell", "host alone, ms", *(arm for arm in arms if arm != "none"))
    show(console, header, rows, markdown=markdown)


def _ratio(ours: Sequence[float], host: Sequence[float]) -> str:
    """Return the ratio of medians, and the middle half of that over blocks of steps."""
    starts = range(0, len(ours) - BLOCK_STEPS + 1, BLOCK_STEPS)
    blocks = [
        statistics.median(ours[start : start + BLOCK_STEPS])
        / statistics.median(host[start : start + BLOCK_STEPS])
        for start in starts
    ]
    whole = statistics.median(ours) / statistics.median(host)
    if len(blocks) < 2:
        return f"{whole:.2f}"
    low, _, high = statistics.quantiles(blocks, n=4)
    return f"{whole:.2f} ({low:.2f} – {high:.2f})"


def median_or_inf(values: Sequence[float]) -> float:
    """Return the median, with what is not a number counted as infinite."""
    return statistics.median(value if math.isfinite(value) else math.inf for value in values)


def draw_divergence(results: Sequence[Result], path: Path) -> None:
    """Draw size and loss at full alpha over steps behind the host, medians over the seeds."""
    import matplotlib as mpl  # noqa: PLC0415 – an optional extra

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, len(OPTIMIZERS), figsize=(10, 5.5), sharex=True, sharey="row")
    for column, optimizer in enumerate(OPTIMIZERS):
        arms = by_cell(results)[results[0].host, optimizer]
        for arm, runs in arms.items():
            points = list(zip(*(run.curve for run in runs), strict=True))
            steps = [point[0][0] for point in points]
            for line, part in ((0, 1), (1, 2)):
                values = [median_or_inf([run[part] for run in point]) for point in points]
                axes[line][column].plot(steps, values, label=arm.replace("_", " "))
        axes[0][column].set_title(optimizer, fontsize=10)
        axes[1][column].set_xlabel("steps behind the host")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.axhline(1.0, color="black", linewidth=0.6)
    axes[0][0].set_ylabel("‖u‖ / ‖h‖")
    axes[1][0].set_ylabel("loss at full alpha\nover loss without the seed")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
