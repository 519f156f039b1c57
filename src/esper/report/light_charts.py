"""Charts of long runs, in as many points as a browser draws without a pause."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from esper.report.chart import Chart

MAX_POINTS = 600
"""Of one line: each marker is an element of the page, and 22,000 of them are drawn in 2 s."""


def lightened(chart: Chart) -> Chart:
    """Return a chart whose lines have at most about `MAX_POINTS` points; its summary says so.

    Gaps in a line stay. What is no line, such as a bar, stays.
    """
    strides = [1]
    data = [_lightened(trace, strides) for trace in chart.figure["data"]]
    if max(strides) == 1:
        return chart
    return replace(
        chart,
        summary=f"{chart.summary} One point in {max(strides)} of the longest line is shown.",
        figure={**chart.figure, "data": data},
    )


def _lightened(trace: dict[str, Any], strides: list[int]) -> dict[str, Any]:
    x = trace.get("x", ())
    if trace.get("type") != "scatter" or "markers" not in trace.get("mode", ""):
        return trace
    points = [index for index, value in enumerate(x) if value is not None]
    if len(points) <= MAX_POINTS:
        return trace
    stride = math.ceil(len(points) / MAX_POINTS)
    strides.append(stride)
    gaps = (index for index, value in enumerate(x) if value is None)
    kept = sorted({*points[::stride], points[-1], *gaps})
    return {name: _taken(value, kept, len(x)) for name, value in trace.items()}


def _taken(value: Any, kept: Sequence[int], length: int) -> Any:
    """Return of what belongs to points only that of the kept ones."""
    if isinstance(value, dict):
        return {name: _taken(inner, kept, length) for name, inner in value.items()}
    if isinstance(value, list) and len(value) == length:
        return [value[index] for index in kept]
    return value
