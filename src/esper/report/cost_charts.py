"""Quality against what it costs: parameters and operations."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.report.chart import Chart, Series, Trace, layout_of, log_axis, si, thinned
from esper.report.story import RunStory
from esper.telemetry.run_reader import MetricRow


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Another network to compare the run with.

    Attributes:
        label: What it is, in a word or two.
        loss: On the test split.
        loss_half_width: Of its 95 % interval; None where it is not known.
        flops: Operations of its training; None where they are not known.
        grown: Whether it grew.
    """

    label: str
    param_count: float
    loss: float
    loss_half_width: float | None = None
    flops: float | None = None
    grown: bool = False


def size_chart(story: RunStory, series: Series, references: Sequence[Reference]) -> Chart | None:
    """Return held-out loss over parameters, from the host's on.

    None if nothing grew, or if the host's are not known.
    """
    losses, host = series.get("loss", ()), story.host_param_count
    if host is None or not losses or not (story.seeds or references):
        return None
    counts = story.param_counts
    points = []
    for step, loss in losses:
        held = [count for since, count in counts if since < step]
        points.append((held[-1] if held else host, loss, step))
    marks = [(r, r.param_count) for r in references]
    final = None if story.finished is None else float(story.finished.param_count)
    chart = _against("size", "Loss against size", "parameters", points, story, marks, final)
    grown = max(count for _, count in counts)
    words = f"From {host:,} parameters to at most {grown:,}."
    return Chart(key=chart.key, title=chart.title, summary=words, figure=chart.figure)


def losses_over_flops(metrics: Iterable[MetricRow]) -> list[tuple[float, float, int]]:
    """Return operations, held-out loss and step wherever both were measured.

    A run that goes back is at a step more than once, and has spent more the second time.

    Args:
        metrics: Of one run, oldest first.
    """
    points, last = [], dict[str, MetricRow]()
    for row in metrics:
        if row.name not in ("loss", "flops"):
            continue
        last[row.name] = row
        if len(last) == 2 and last["loss"].step == last["flops"].step:
            flops, loss = last.pop("flops").value, last.pop("loss").value
            if math.isfinite(flops) and math.isfinite(loss):
                points.append((flops, loss, row.step))
    return points


def flops_chart(
    story: RunStory, metrics: Iterable[MetricRow], references: Sequence[Reference]
) -> Chart | None:
    """Return held-out loss over operations; None where they were not counted."""
    points = losses_over_flops(metrics)
    if not points:
        return None
    marks = [(r, r.flops) for r in references if r.flops is not None]
    chart = _against(
        "flops",
        "Loss against compute",
        "floating-point operations",
        points,
        story,
        marks,
        points[-1][0] if story.finished is not None else None,
    )
    words = (
        f"{si(points[-1][0])} operations in all, of training, seeds that were pruned and deciding."
    )
    return Chart(key=chart.key, title=chart.title, summary=words, figure=chart.figure)


def _against(
    key: str,
    title: str,
    unit: str,
    points: Sequence[tuple[float, float, int]],
    story: RunStory,
    references: Sequence[tuple[Reference, float]],
    final: float | None,
) -> Chart:
    kept = thinned(points)
    data: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "held out, darker later",
            "x": [cost for cost, _, _ in kept],
            "y": [loss for _, loss, _ in kept],
            "customdata": [step for _, _, step in kept],
            "hovertemplate": "step %{customdata}: %{x:.4s} " + unit + ", loss %{y:.4g}"
            "<extra></extra>",
            "marker": {
                "size": 5,
                "color": [step for _, _, step in kept],
                "colorscale": [[0, "#a9c3e0"], [1, "#3470ad"]],
            },
        }
    ]
    if final is not None and story.finished is not None and "loss" in story.finished.metrics:
        test = story.finished.metrics["loss"]
        data.append(_mark("this run, test", [(final, test, None)], "star", "#2e9d63", size=15))
    for grown, name, symbol, colour, place in (
        (False, "never grew, test", "circle", "#8e7cc3", "bottom center"),
        (True, "grown, test", "diamond", "#e8743b", "top center"),
    ):
        chosen = [(r, cost) for r, cost in references if r.grown is grown]
        if chosen:
            triples = [(cost, r.loss, r.loss_half_width) for r, cost in chosen]
            mark = _mark(name, triples, symbol, colour, size=10)
            mark |= {
                "mode": "markers+text",
                "text": [r.label for r, _ in chosen],
                "textposition": place,
                "textfont": {"size": 11, "color": colour},
                "cliponaxis": False,
            }
            data.append(mark)
    losses = [*(loss for _, loss, _ in points), *(r.loss for r, _ in references)]
    layout = layout_of(
        x={"title": {"text": unit}, "exponentformat": "SI"},
        y=log_axis("loss", losses),
    )
    return Chart(key=key, title=title, summary="", figure={"data": data, "layout": layout})


def _mark(
    name: str,
    points: Sequence[tuple[float, float, float | None]],
    symbol: str,
    colour: str,
    *,
    size: int,
) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for x, _, _ in points],
        "y": [y for _, y, _ in points],
        "error_y": {"type": "data", "array": [error for _, _, error in points], "thickness": 1},
        "hovertemplate": "%{x:.4s}, loss %{y:.4g}<extra>%{fullData.name}</extra>",
        "marker": {"symbol": symbol, "size": size, "color": colour},
    }
