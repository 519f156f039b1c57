"""Charts as a PNG, by matplotlib: for documents, and for who has no browser."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from esper.report.chart import Chart, Trace, si
from esper.report.figure import new_figure

_ON_PAPER: Mapping[str, str] = MappingProxyType(
    {
        "var(--ink)": "#1b2733",
        "var(--quiet)": "#8a97a3",
        "var(--line)": "#e1e6ec",
        "var(--card)": "#ffffff",
    }
)
_INK, _QUIET, _LINE = _ON_PAPER["var(--ink)"], _ON_PAPER["var(--quiet)"], _ON_PAPER["var(--line)"]
_MARKERS: Mapping[str, str] = MappingProxyType(
    {
        "circle": "o",
        "circle-open": "o",
        "diamond": "D",
        "star": "*",
        "triangle-up": "^",
        "x": "X",
        "x-thin": "x",
    }
)
_PIXELS_PER_INCH = 100.0
_POINTS_PER_PIXEL = 0.62
_WIDTH_INCHES = 10.4
_TITLE_INCHES = 0.75
_EARLY, _LATE = "#a9c3e0", "#3470ad"


class NothingToDrawError(ValueError):
    """There is no chart to draw."""


def draw_charts(title: str, charts: Sequence[Chart], target: Path) -> None:
    """Write charts as one PNG, two in a row where neither is wide.

    Args:
        title: Above all of them.
        charts: In this order.
        target: File to write.

    Raises:
        NothingToDrawError: There is none.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if not charts:
        raise NothingToDrawError("there is nothing to draw: nothing was measured yet")
    rows = _rows(charts)
    heights = [
        max(chart.figure["layout"]["height"] for chart in row) / _PIXELS_PER_INCH + _TITLE_INCHES
        for row in rows
    ]
    figure = new_figure(_WIDTH_INCHES, sum(heights) + 0.5)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.14, hspace=0.05, wspace=0.03)
    figure.suptitle(title, x=0.016, ha="left", color=_INK, fontsize=14, weight="bold")
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for index, row in enumerate(rows):
        for column, chart in enumerate(row):
            place = grid[index, :] if len(row) == 1 else grid[index, column]
            _draw(figure.add_subplot(place), chart)
    figure.savefig(target, metadata={"Software": None})


def _rows(charts: Sequence[Chart]) -> list[list[Chart]]:
    rows: list[list[Chart]] = []
    for chart in charts:
        last = rows[-1] if rows else []
        if not chart.wide and len(last) == 1 and not last[0].wide:
            last.append(chart)
        else:
            rows.append([chart])
    return rows


def _draw(axes: Any, chart: Chart) -> None:
    layout = chart.figure["layout"]
    traces: Sequence[Trace] = chart.figure["data"]
    for trace in traces:
        if trace["type"] == "bar":
            _draw_bars(axes, trace)
        else:
            _draw_points(axes, trace)
    _set_axis(axes, "x", layout["xaxis"])
    _set_axis(axes, "y", layout["yaxis"])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
    axes.tick_params(colors=_INK, labelsize=8, which="both", length=0)
    axes.set_axisbelow(True)
    axes.set_title(chart.title, loc="left", color=_INK, fontsize=10.5, weight="bold", pad=22)
    axes.legend(
        frameon=False,
        fontsize=7.5,
        ncols=max(1, len(traces)),
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        borderaxespad=0.0,
        columnspacing=1.2,
        handletextpad=0.4,
        handlelength=1.4,
        labelcolor=_INK,
    )


def _draw_bars(axes: Any, trace: Trace) -> None:
    axes.barh(
        trace["y"],
        trace["x"],
        left=trace["base"],
        height=trace["width"],
        color=_colour(trace["marker"]["color"]),
        alpha=trace.get("opacity", 1.0),
        linewidth=0,
        label=trace["name"],
    )


def _draw_points(axes: Any, trace: Trace) -> None:
    x, y = _numbers(trace["x"]), _numbers(trace["y"])
    mode, marker, line = trace["mode"], trace.get("marker", {}), trace.get("line", {})
    shown = {"label": trace["name"] if trace.get("showlegend", True) else None}
    colour = marker.get("color", line.get("color"))
    size = marker.get("size", 6) * _POINTS_PER_PIXEL
    symbol = _MARKERS[marker.get("symbol", "circle")]
    if isinstance(colour, list):  # by time
        from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 – an extra

        by_time = LinearSegmentedColormap.from_list("time", [_EARLY, _LATE])
        axes.scatter(x, y, c=colour, cmap=by_time, s=size**2, linewidths=0, **shown)
        return
    axes.plot(
        x,
        y,
        color=_colour(line.get("color", colour)),
        linewidth=line.get("width", 1.5) * _POINTS_PER_PIXEL * 1.2 if "lines" in mode else 0,
        linestyle=":" if line.get("dash") == "dot" else "-",
        marker=symbol if "markers" in mode else None,
        markersize=size,
        markerfacecolor="white" if marker.get("symbol") == "circle-open" else _colour(colour),
        markeredgecolor=_colour(colour),
        markeredgewidth=2.0 if symbol == "x" else 0.8,
        zorder=3 if mode == "markers" else 2,
        **shown,
    )
    _draw_errors(axes, x, y, trace)
    if "text" in mode:
        below = trace["textposition"].startswith("bottom")
        for words, at, height in zip(trace["text"], x, y, strict=True):
            axes.annotate(
                words,
                (at, height),
                xytext=(4, -11 if below else 5),
                textcoords="offset points",
                fontsize=7.5,
                color=_colour(trace["textfont"]["color"]),
            )


def _draw_errors(axes: Any, x: Sequence[float], y: Sequence[float], trace: Trace) -> None:
    errors = _numbers(trace.get("error_y", {}).get("array", []))
    if any(math.isfinite(error) for error in errors):
        colour = _colour(trace["marker"]["color"])
        cap = trace["error_y"].get("width", 3) / 2
        axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=colour, elinewidth=0.9, capsize=cap)


def _set_axis(axes: Any, which: str, settings: Mapping[str, Any]) -> None:
    axis, is_x = getattr(axes, f"{which}axis"), which == "x"
    (axes.set_xlabel if is_x else axes.set_ylabel)(
        settings.get("title", {}).get("text", ""), color=_INK, fontsize=8.5
    )
    if settings.get("type") == "log":
        (axes.set_xscale if is_x else axes.set_yscale)("log")
        axis.set_minor_formatter("")
    limits = axes.get_xlim() if is_x else axes.get_ylim()
    if "range" in settings:
        limits = tuple(settings["range"])
    elif settings.get("rangemode") == "tozero" and settings.get("type") != "log":
        limits = (0.0, limits[1])
    if "tickvals" in settings:
        axis.set_ticks(settings["tickvals"], labels=settings["ticktext"])
    elif "exponentformat" in settings:
        axis.set_major_formatter(lambda value, _: si(value))
    (axes.set_xlim if is_x else axes.set_ylim)(limits)
    if settings.get("showgrid", True):
        axis.grid(visible=True, color=_LINE, linewidth=0.8)
    if settings.get("zeroline") and not is_x:
        axes.axhline(0.0, color=_QUIET, linewidth=0.8)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _colour(name: Any) -> Any:
    return _ON_PAPER.get(name, name)
