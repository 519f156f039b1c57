"""A picture as a plotly figure, and what pictures of a run are made of.

Figures are plain dicts, drawn by the report page and the dashboard. A colour may be the name of a
custom property of the page, as `var(--ink)`, so that one figure reads well in light and dark;
`static/charts.js` resolves them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from esper.lifecycle.stages import SeedStage
from esper.report.story import RunStory, SeedStory
from esper.telemetry.progress import Unit

Trace = dict[str, Any]
Point = TypeVar("Point")

STAGE_COLOURS = {
    SeedStage.GERMINATED: "#9fb1c1",
    SeedStage.TRAINING: "#f2b134",
    SeedStage.BLENDING: "#e8743b",
    SeedStage.SHADOWING: "#8e7cc3",
    SeedStage.PROBATIONARY: "#3d85c6",
    SeedStage.FOSSILIZED: "#2e9d63",
    SeedStage.PRUNED: "#d0453c",
}
"""One colour per stage of a seed's life; also told apart by the legend's order."""

SEED_COLOURS = ("#3d85c6", "#e8743b", "#2e9d63", "#8e7cc3", "#d9a000", "#c2487f", "#3aa6a6")

INK, QUIET, LINE = "var(--ink)", "var(--quiet)", "var(--line)"
PANEL_HEIGHT = 300
_THOUSAND = 1000.0
_ROUNDED_TO_A_THOUSAND = 999.5
_LINEAR_FACTOR = 3.0
"""Between the lowest and the highest value, below which an axis is linear."""
_STEPS = ((10.0, (1, 2, 3, 5, 7)), (100.0, (1, 2, 5)), (1000.0, (1, 3)))
"""Ticks in a decade, by the factor between the lowest and the highest value that they are for."""
_MAX_POINTS = 2000
"""Of one line: more cannot be told apart on a screen."""

Series = Mapping[str, Sequence[tuple[int, float]]]
"""Finite values by metric, each with its step."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture with what it says.

    Attributes:
        key: Names it in a page.
        title: Its heading.
        summary: In sentences, what can be seen: for who cannot see it, and who is in a hurry.
        figure: `data` and `layout` of a plotly figure.
        wide: Takes the whole width of a page that has room for two.
    """

    key: str
    title: str
    summary: str
    figure: dict[str, Any]
    wide: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values, in which numbers that are not finite are None."""
        values: dict[str, Any] = json_values(asdict(self))
        return values


def json_values(value: Any) -> Any:
    """Return mappings, sequences and plain values with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return value


def layout_of(
    *,
    x: Mapping[str, Any] | None = None,
    y: Mapping[str, Any] | None = None,
    height: int = PANEL_HEIGHT,
) -> dict[str, Any]:
    """Return a figure's layout over optimizer steps, with what the axes have otherwise."""
    axis = {
        "gridcolor": LINE,
        "linecolor": LINE,
        "zerolinecolor": QUIET,
        "tickcolor": LINE,
        "automargin": True,
        "zeroline": False,
    }
    return {
        "height": height,
        "margin": {"l": 12, "r": 16, "t": 8, "b": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "var(--font)", "color": INK, "size": 12.5},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": LINE, "font": {"color": INK}},
        "hovermode": "closest",
        "uirevision": "kept",
        "xaxis": {**axis, "title": {"text": "optimizer step"}, "rangemode": "tozero", **(x or {})},
        "yaxis": {**axis, **(y or {})},
    }


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """Return a logarithmic axis, whose title says so, with as many ticks as have room on a phone.

    A linear one where a value is not above 0, and where values lie so near to each other that a
    logarithmic one might have no tick among them.
    """
    lowest, highest = math.inf, -math.inf
    for value in values:
        lowest, highest = min(lowest, value), max(highest, value)
    if not 0.0 < lowest <= highest < math.inf or highest < _LINEAR_FACTOR * lowest:
        return {"title": {"text": title}}
    steps = next((steps for below, steps in _STEPS if highest < below * lowest), (1,))
    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {
        "title": {"text": f"{title} (log)"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [si(tick) for tick in ticks],
    }


def line_of(points: Sequence[tuple[int, float]], name: str, colour: str, *, width: float) -> Trace:
    """Return a line through points, of which a long run keeps some thousand."""
    kept = thinned(points)
    return {
        "type": "scatter",
        "mode": "lines" if len(kept) > 1 else "markers",
        "name": name,
        "x": [step for step, _ in kept],
        "y": [value for _, value in kept],
        "line": {"color": colour, "width": width},
        "marker": {"color": colour},
        "hovertemplate": "%{y:.4g} at step %{x}<extra>%{fullData.name}</extra>",
    }


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return evenly chosen points, the first and the last included."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stride = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(index * stride)] for index in range(_MAX_POINTS)]


def seed_name(seed: SeedStory, unit: Unit) -> str:
    """Return what tells a seed from others: its blueprint, its slot, and when it germinated."""
    return f"{seed.blueprint} in {seed.slot}, {unit} {seed.epoch}"


def si(value: float) -> str:
    """Return a number, with a prefix if it is large: 15 G."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    index = 0
    while abs(value) >= _ROUNDED_TO_A_THOUSAND and index < len(prefixes) - 1:
        value, index = value / _THOUSAND, index + 1
    return f"{value:.3g} {prefixes[index]}".strip()


def growth_words(story: RunStory) -> str:
    """Return in a sentence how many seeds there were and what became of them."""
    if not story.seeds:
        return "Nothing grew."
    counts: dict[str, int] = {}
    for seed in story.seeds:
        counts[seed.outcome] = counts.get(seed.outcome, 0) + 1
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    number = len(story.seeds)
    return f"{number} {'seed' if number == 1 else 'seeds'}: {told}."
