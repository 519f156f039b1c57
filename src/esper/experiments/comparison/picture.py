"""A comparison as one picture: loss over compute, every point a run to its end."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.experiments.comparison.plan import GROWN, HOST, STATIC
from esper.experiments.comparison.summary import ArmSummary, Verdict
from esper.report.figure import new_figure

_INK = "#22303c"
_QUIET = "#8a97a3"
_STATIC = "#3d85c6"
_GROWN = "#2e8b57"
_DECADE = 10.0
_OTHERS = ("#e8743b", "#8e7cc3", "#b3261e", "#f2b134")


def draw_comparison(
    title: str, summaries: Sequence[ArmSummary], verdict: Verdict, target: Path
) -> None:
    """Write a PNG: test loss over operations, arms that never grew joined by a line.

    An arm that diverged is left out.

    Args:
        title: What was compared.
        summaries: Of every arm.
        verdict: Written above the plot.
        target: File to write.

    Raises:
        ValueError: No arm has finished runs with a finite loss.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    summaries = [summary for summary in summaries if math.isfinite(summary.test_loss.mean)]
    if not summaries:
        raise ValueError("there is nothing to draw: no arm has finished runs with a finite loss")
    figure = new_figure(9.0, 5.4)
    axis = figure.subplots()
    others = iter(_OTHERS * len(summaries))
    static = [s for s in summaries if s.arm == HOST or s.arm.startswith(STATIC)]
    most = max(summary.num_seeds for summary in summaries)
    _join(axis, [summary for summary in static if summary.num_seeds == most])
    for summary in summaries:
        known = {GROWN: _GROWN} | dict.fromkeys((s.arm for s in static), _STATIC)
        colour = known.get(summary.arm) or next(others)
        _draw_arm(axis, summary, colour, label=summary.label(most))
    _fit(axis, summaries)
    axis.set_xscale("log")
    _label_few(axis, summaries)
    axis.xaxis.set_minor_formatter("{x:.2g}")
    axis.xaxis.set_major_formatter("{x:.2g}")
    axis.set_xlabel("floating-point operations of one run", color=_INK)
    axis.set_ylabel("test loss (bars: 95 % of the difference to static, by seed)", color=_INK)
    axis.tick_params(colors=_QUIET, which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_QUIET)
    axis.legend(loc="lower left", frameon=False, labelcolor=_INK, fontsize=9)
    axis.set_title(
        f"{title}: {verdict.outcome}", loc="left", color=_INK, fontsize=12, weight="bold"
    )
    figure.savefig(target, bbox_inches="tight", metadata={"Software": None})


def _join(axis: Any, static: Sequence[ArmSummary]) -> None:
    points = sorted((summary.flops, summary.test_loss.mean) for summary in static)
    axis.plot(*zip(*points, strict=True), color=_STATIC, linewidth=1.0, alpha=0.5, zorder=1)


def _fit(axis: Any, summaries: Sequence[ArmSummary]) -> None:
    """Show all means; an interval of few seeds may be many times as wide, and is cut off."""
    drawn = [loss for summary in summaries for _, loss in summary.curve]
    losses = [loss for loss in drawn if math.isfinite(loss)]
    reach = max(losses) - min(losses) or 1.0
    axis.set_ylim(min(losses) - 0.35 * reach, max(losses) + 0.35 * reach)


def _label_few(axis: Any, summaries: Sequence[ArmSummary]) -> None:
    """Label 1, 2 and 5 alone where all nine of each decade would run into each other."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 – an extra, needed for pictures only

    costs = [cost for summary in summaries for cost, _ in summary.curve]
    if max(costs) > _DECADE * min(costs):
        axis.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))


def _draw_arm(axis: Any, summary: ArmSummary, colour: str, *, label: str) -> None:
    loss, difference = summary.test_loss, summary.difference
    reach = 0.0 if difference is None else difference.half_width or 0.0
    axis.errorbar(
        [summary.flops],
        [loss.mean],
        yerr=[reach],
        color=colour,
        fmt="o",
        capsize=3,
        zorder=3,
        label=None if summary.arm.startswith(f"{STATIC} ") else _legend(summary.arm),
    )
    if len(summary.curve) > 1:
        x, y = zip(*summary.curve, strict=True)
        axis.plot(x, y, color=colour, linewidth=1.0, linestyle=":", zorder=2)
        others = [point for point in summary.curve if point[0] != summary.flops]
        axis.scatter(
            *zip(*others, strict=True), s=14, facecolor="white", edgecolor=colour, zorder=3
        )
    if colour == _STATIC:
        axis.annotate(
            label,
            (summary.flops, loss.mean),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )


def _legend(arm: str) -> str:
    names = {
        HOST: "never grew, by size (line: equal steps)",
        GROWN: "grown (open: other budgets)",
        STATIC: None,
    }
    return names.get(arm, arm) or "_"
