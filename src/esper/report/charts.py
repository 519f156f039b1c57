"""All pictures of one run."""

import math
from collections.abc import Iterable, Sequence

from esper.report.chart import Chart, Series
from esper.report.cost_charts import Reference, flops_chart, size_chart
from esper.report.lanes_chart import lanes_chart
from esper.report.light_charts import lightened
from esper.report.quality_charts import loss_chart, quality_chart
from esper.report.seed_charts import contribution_chart, gradient_chart
from esper.report.story import RunStory
from esper.telemetry.run_reader import MetricRow

NOT_QUALITY = frozenset({"loss", "train_loss", "step_seconds", "flops"})
"""Metrics that are not a measure of quality besides the loss."""


def run_charts(
    story: RunStory, metrics: Sequence[MetricRow], *, references: Sequence[Reference] = ()
) -> list[Chart]:
    """Return every picture of a run that there is something to show in, most telling first.

    Args:
        story: From `tell`, of a run that may still be going on.
        metrics: Of the run, oldest first.
        references: Networks to compare with, as a comparison has them.
    """
    series = _series(metrics)
    charts = [
        loss_chart(story, series),
        *(quality_chart(story, series, name) for name in quality_names(metrics)),
        lanes_chart(story, series),
        contribution_chart(story),
        gradient_chart(story),
        size_chart(story, series, references),
        flops_chart(story, metrics, references),
    ]
    return [lightened(chart) for chart in charts if chart is not None]


def quality_names(metrics: Iterable[MetricRow]) -> list[str]:
    """Return the held-out metrics besides the loss, in the order in which they came."""
    return [name for name in dict.fromkeys(row.name for row in metrics) if name not in NOT_QUALITY]


def _series(metrics: Iterable[MetricRow]) -> Series:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in metrics:
        if math.isfinite(row.value):
            series.setdefault(row.name, []).append((row.step, row.value))
    return series
