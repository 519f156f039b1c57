"""A run as one picture: quality over time, and what grew in each slot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.lifecycle.stages import SeedStage
from esper.report.chart import STAGE_COLOURS
from esper.report.charts import quality_names
from esper.report.figure import new_figure
from esper.report.story import RunStory, SeedStory
from esper.telemetry.run_store import MetricRow, RunReader

_ENDS = frozenset({SeedStage.FOSSILIZED, SeedStage.PRUNED})
_ALPHA = "alpha"
_INK = "#22303c"
_QUIET = "#8a97a3"
_LANE_HEIGHT = 0.62


def draw_run(reader: RunReader, story: RunStory, target: Path) -> None:
    """Write a PNG of the run: held-out metrics with growth events, and a lane per slot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    metrics = reader.metrics()
    names = ["loss", *quality_names(metrics)[:1]]
    last_step = max((row.step for row in metrics), default=1)
    lanes = max(1, len(story.slots))
    figure = new_figure(9.6, 2.6 * len(names) / 1.4 + 0.75 * lanes + 1.0)
    axes = figure.subplots(
        len(names) + 1,
        1,
        sharex=True,
        gridspec_kw={"height_ratios": [2.2] * len(names) + [0.75 * lanes]},
        squeeze=False,
    )[:, 0]
    for axis, name in zip(axes, names, strict=False):
        _draw_metric(axis, name, metrics, story)
    _draw_lanes(axes[-1], story, last_step)
    axes[-1].set_xlim(0, last_step * 1.01)
    axes[-1].set_xlabel("optimizer step", color=_INK)
    axes[0].set_title(_title(reader, story), loc="left", color=_INK, fontsize=12, weight="bold")
    figure.align_ylabels(list(axes))
    figure.savefig(target, bbox_inches="tight", metadata={"Software": None})


def _title(reader: RunReader, story: RunStory) -> str:
    task = reader.config().get("task", "run")
    grown = len(story.committed)
    seeds = "seed" if grown == 1 else "seeds"
    refused = sum(seed.outcome == "pruned" for seed in story.seeds)
    return f"{task}: {grown} {seeds} committed, {refused} pruned"


def _draw_metric(axis: Any, name: str, metrics: Sequence[MetricRow], story: RunStory) -> None:
    _style(axis)
    shown = [(name, f"held-out {name}", _INK, 1.8)]
    if name == "loss":
        shown.insert(0, ("train_loss", "training loss", _QUIET, 1.2))
    for metric, label, colour, width in shown:
        points = [(row.step, row.value) for row in metrics if row.name == metric]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label)
    if name == "loss":
        axis.set_yscale("log")
    for seed in story.committed:
        axis.axvline(seed.end_step, color=STAGE_COLOURS[SeedStage.FOSSILIZED], alpha=0.55, lw=1.2)
    axis.set_ylabel(name, color=_INK)
    if axis.get_lines():
        axis.legend(frameon=False, fontsize=8, loc="best", labelcolor=_INK)


def _draw_lanes(axis: Any, story: RunStory, last_step: int) -> None:
    _style(axis)
    lanes = {slot: len(story.slots) - 1 - index for index, slot in enumerate(story.slots)}
    labelled: set[SeedStage] = set()
    for seed in story.seeds:
        _draw_life(axis, seed, lanes[seed.slot], last_step, labelled)
    axis.set_yticks(list(lanes.values()), labels=list(lanes), color=_INK)
    axis.set_ylim(-0.6, len(lanes) - 0.4)
    axis.set_ylabel("slot", color=_INK)
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    known = [stage.value for stage in STAGE_COLOURS] + [_ALPHA]
    order = sorted(range(len(labels)), key=lambda index: known.index(labels[index]))
    axis.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        fontsize=8,
        ncols=max(1, len(labels)),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.32 if len(lanes) > 1 else -0.5),
        labelcolor=_INK,
    )


def _draw_life(
    axis: Any, seed: SeedStory, lane: int, last_step: int, labelled: set[SeedStage]
) -> None:
    visits = [visit for visit in seed.stages if visit.stage in STAGE_COLOURS]
    end = seed.end_step if seed.end_step is not None else last_step
    for visit, following in zip(visits, [*visits[1:], None], strict=True):
        until = following.step if following is not None else end
        if visit.stage in _ENDS or until <= visit.step:
            continue
        label = None if visit.stage in labelled else visit.stage.value
        labelled.add(visit.stage)
        axis.barh(
            lane,
            until - visit.step,
            left=visit.step,
            height=_LANE_HEIGHT,
            color=STAGE_COLOURS[visit.stage],
            label=label,
        )
    if seed.committed:
        label = None if SeedStage.FOSSILIZED in labelled else SeedStage.FOSSILIZED.value
        labelled.add(SeedStage.FOSSILIZED)
        axis.plot(
            end,
            lane,
            marker="D",
            markersize=7,
            color=STAGE_COLOURS[SeedStage.FOSSILIZED],
            label=label,
            linestyle="none",
            zorder=4,
        )
    elif seed.outcome == "pruned":
        label = None if SeedStage.PRUNED in labelled else SeedStage.PRUNED.value
        labelled.add(SeedStage.PRUNED)
        axis.plot(
            end,
            lane,
            marker="x",
            markersize=7,
            mew=2,
            color=STAGE_COLOURS[SeedStage.PRUNED],
            label=label,
            linestyle="none",
            zorder=4,
        )
    axis.annotate(
        seed.blueprint,
        (seed.step, lane + _LANE_HEIGHT / 2),
        xytext=(1, 2),
        textcoords="offset points",
        fontsize=7.5,
        color=_INK,
    )
    _draw_alpha(axis, seed, lane, end)


def _draw_alpha(axis: Any, seed: SeedStory, lane: int, end: int) -> None:
    points = seed.alpha_points(end)
    if not points:
        return
    base = lane - _LANE_HEIGHT / 2
    steps, heights = zip(
        *((step, base + alpha * _LANE_HEIGHT) for step, alpha in points), strict=True
    )
    shown = axis.get_legend_handles_labels()[1]
    label = None if _ALPHA in shown else _ALPHA
    axis.plot(steps, heights, color=_INK, linewidth=1.3, zorder=3, label=label)


def _style(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_QUIET)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.grid(axis="y", color="#e6eaee", linewidth=0.8)
    axis.set_axisbelow(True)
