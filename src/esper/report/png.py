"""Charts as a PNG, by matplotlib: for documents, and for who has no browser."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from esper.report.chart import Chart, Trace, si
from esper.report.figure import new_figure
from esper.telemetry.run_folder import replace_file

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
_POINTS_PER_INCH = 72.0
_NAME_POINTS = 7.5
"""Size of the letters of a legend."""
_NAME_ROW_POINTS = 11.6
_BESIDE_NAME_POINTS, _BETWEEN_NAMES_POINTS = 13.5, 9.0
"""What a legend has left of each name, and between its columns, with the sizes that it is given."""
_HALF_POINTS, _WHOLE_POINTS = 290.0, 600.0
"""Room for a legend above a chart that has a neighbour, and above one that has none."""
_EARLY, _LATE = "#a9c3e0", "#3470ad"


class NothingToDrawError(ValueError):
    """There is no chart to draw."""


def draw_charts(title: str, charts: Sequence[Chart], target: str | Path) -> None:
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
    figure = new_figure(_WIDTH_INCHES, 1.0)
    from matplotlib import rc_context  # noqa: PLC0415 – an extra, which new_figure has asked for

    with rc_context({"text.parse_math": False}):  # a $ in a name is one
        _draw_rows(figure, title, _rows(charts))
        picture, target = BytesIO(), Path(target)
        figure.savefig(picture, format=target.suffix[1:], metadata={"Software": None})
    replace_file(target, picture.getvalue())


def _draw_rows(figure: Any, title: str, rows: Sequence[Sequence[Chart]]) -> None:
    columns = [[_legend_columns(chart, alone=len(row) == 1) for chart in row] for row in rows]
    heights = [max(map(_inches, row, counts)) for row, counts in zip(rows, columns, strict=True)]
    figure.set_size_inches(_WIDTH_INCHES, sum(heights) + 0.5)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.14, hspace=0.05, wspace=0.03)
    figure.suptitle(title, x=0.016, ha="left", color=_INK, fontsize=14, weight="bold")
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for index, row in enumerate(rows):
        for column, chart in enumerate(row):
            place = grid[index, :] if len(row) == 1 else grid[index, column]
            _draw(figure.add_subplot(place), chart, columns[index][column])


def _named(chart: Chart) -> list[str]:
    """Return the names in a chart's legend."""
    traces: Sequence[Trace] = chart.figure["data"]
    return [trace["name"] for trace in traces if trace.get("showlegend", True)]


def _legend_columns(chart: Chart, *, alone: bool) -> int:
    """Return in how many columns, filled one after the other, a chart's legend has room."""
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415 – an extra
    from matplotlib.textpath import text_to_path  # noqa: PLC0415

    font = FontProperties(size=_NAME_POINTS)
    measure = text_to_path.get_text_width_height_descent
    sizes = [measure(name, font, ismath=False) for name in _named(chart)]
    widths = [width + _BESIDE_NAME_POINTS for width, _, _ in sizes]
    room = _WHOLE_POINTS if alone else _HALF_POINTS
    for columns in range(len(widths), 1, -1):
        short, longer = divmod(len(widths), columns)
        ends = list(accumulate(short + (index < longer) for index in range(columns)))
        widest = [max(widths[start:end]) for start, end in pairwise([0, *ends])]
        if sum(widest) + (columns - 1) * _BETWEEN_NAMES_POINTS <= room:
            return columns
    return 1


def _lines_above(chart: Chart, columns: int) -> float:
    """Return the height of a legend without its first line, in points."""
    lines = math.ceil(len(_named(chart)) / columns)
    return max(0, lines - 1) * _NAME_ROW_POINTS


def _inches(chart: Chart, columns: int) -> float:
    """Return the height of a chart with its title and its legend."""
    height: float = chart.figure["layout"]["height"] / _PIXELS_PER_INCH
    return height + _TITLE_INCHES + _lines_above(chart, columns) / _POINTS_PER_INCH


def _rows(charts: Sequence[Chart]) -> list[list[Chart]]:
    rows: list[list[Chart]] = []
    for chart in charts:
        last = rows[-1] if rows else []
        if not chart.wide and len(last) == 1 and not last[0].wide:
            last.append(chart)
        else:
            rows.append([chart])
    return rows


def _draw(axes: Any, chart: Chart, legend_columns: int) -> None:
    layout = chart.figure["layout"]
    shown: list[Any] = []
    for trace in chart.figure["data"]:
        drawn = (_draw_bars if trace["type"] == "bar" else _draw_points)(axes, trace)
        if trace.get("showlegend", True):
            shown.append(drawn)
    _set_axis(axes, "x", layout["xaxis"])
    _set_axis(axes, "y", layout["yaxis"])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
    axes.tick_params(colors=_INK, labelsize=8, which="both", length=0)
    axes.set_axisbelow(True)
    pad = 22 + _lines_above(chart, legend_columns)
    axes.set_title(chart.title, loc="left", color=_INK, fontsize=10.5, weight="bold", pad=pad)
    _draw_legend(axes, shown, _named(chart), legend_columns)


def _draw_legend(axes: Any, shown: Sequence[Any], names: Sequence[str], columns: int) -> None:
    legend = axes.legend(
        shown,
        [""] * len(shown),  # one that begins with _ would be left out
        frameon=False,
        fontsize=_NAME_POINTS,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        borderaxespad=0.0,
        columnspacing=1.2,
        handletextpad=0.4,
        handlelength=1.4,
        labelcolor=_INK,
    )
    legend.set_in_layout(False)  # the title above it makes room
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _draw_bars(axes: Any, trace: Trace) -> Any:
    return axes.barh(
        trace["y"],
        trace["x"],
        left=trace["base"],
        height=trace["width"],
        color=_colour(trace["marker"]["color"]),
        alpha=trace.get("opacity", 1.0),
        linewidth=0,
    )


def _draw_points(axes: Any, trace: Trace) -> Any:
    x, y = _numbers(trace["x"]), _numbers(trace["y"])
    mode, marker, line = trace["mode"], trace.get("marker", {}), trace.get("line", {})
    colour = marker.get("color", line.get("color"))
    size = marker.get("size", 6) * _POINTS_PER_PIXEL
    symbol = _MARKERS[marker.get("symbol", "circle")]
    if isinstance(colour, list):  # by time
        from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 – an extra

        by_time = LinearSegmentedColormap.from_list("time", [_EARLY, _LATE])
        return axes.scatter(x, y, c=colour, cmap=by_time, s=size**2, linewidths=0)
    (drawn,) = axes.plot(
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
    return drawn


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
