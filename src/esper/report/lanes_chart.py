"""A lane per slot, coloured by what its seeds went through."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from esper.lifecycle.stages import SeedStage
from esper.report.chart import INK, STAGE_COLOURS, Chart, Series, Trace, growth_words, layout_of
from esper.report.story import RunStory, SeedStory

Bar = tuple[int, int, int, str]
"""Its first step, its length, its lane, and what it is."""

_LANE_HEIGHT = 58
_LANE_MARGIN = 96
_LANE_BAR = 0.64
_COMMITTED_OPACITY = 0.3
_LAST_IN_LEGEND = 1001
"""The others have 1000."""


def lanes_chart(story: RunStory, series: Series) -> Chart | None:
    """Return each slot's seeds by stage with their alpha; None if nothing grew."""
    if not story.slots or not story.seeds:
        return None
    last = max([story.last_step, *(points[-1][0] for points in series.values() if points)])
    lanes = {slot: len(story.slots) - 1 - index for index, slot in enumerate(story.slots)}
    data = [*_committed_bars(story, lanes, last), *_stage_bars(story, lanes, last)]
    data += [*_alpha_lines(story, lanes, last), *_ends(story, lanes)]
    layout = layout_of(
        height=_LANE_MARGIN + _LANE_HEIGHT * len(lanes),
        y={
            "tickvals": list(lanes.values()),
            "ticktext": list(lanes),
            "range": [-0.5, len(lanes) - 0.5],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
    )
    layout |= {"barmode": "overlay", "hovermode": "closest"}
    layout["xaxis"]["range"] = [0, last * 1.01 or 1]
    return Chart(
        key="lanes",
        title="What grew in each slot",
        summary=growth_words(story)
        + " One lane per slot, coloured by stage, and pale from a commit on; the line in it is "
        "alpha, from 0 at the lane's bottom to 1 at its top.",
        figure={"data": data, "layout": layout},
        wide=True,
    )


def _committed_bars(story: RunStory, lanes: Mapping[str, int], last: int) -> list[Trace]:
    """Return what the host holds in each slot from a commit on, behind whatever grows there."""
    held: dict[str, list[SeedStory]] = {}
    for seed in story.committed:
        held.setdefault(seed.slot, []).append(seed)
    bars: list[Bar] = []
    for slot, seeds in held.items():
        steps = [seed.end_step or 0 for seed in seeds]
        for index, (start, until) in enumerate(pairwise([*steps, last])):
            names = ", ".join(seed.blueprint for seed in seeds[: index + 1])
            if until > start:
                bars.append((start, until - start, lanes[slot], f"{names} in {slot}: committed"))
    if not bars:
        return []
    colour = STAGE_COLOURS[SeedStage.FOSSILIZED]
    drawn = _bars("in the host", bars, colour)
    return [{**drawn, "opacity": _COMMITTED_OPACITY, "legendrank": _LAST_IN_LEGEND}]


def _stage_bars(story: RunStory, lanes: Mapping[str, int], last: int) -> list[Trace]:
    bars: dict[SeedStage, list[Bar]] = {}
    for seed in story.seeds:
        end = last if seed.end_step is None else seed.end_step
        visits = [visit for visit in seed.stages if visit.stage in STAGE_COLOURS]
        untils = [*(visit.step for visit in visits[1:]), end]
        for visit, until in zip(visits, untils, strict=True):
            ended = visit.stage in (SeedStage.FOSSILIZED, SeedStage.PRUNED)
            if not ended and until > visit.step:
                words = f"{seed.blueprint} in {seed.slot}: {visit.stage.name}"
                bar = (visit.step, until - visit.step, lanes[seed.slot], words)
                bars.setdefault(visit.stage, []).append(bar)
    return [
        _bars(stage.name.lower(), bars[stage], colour)
        for stage, colour in STAGE_COLOURS.items()
        if stage in bars
    ]


def _bars(name: str, bars: Sequence[Bar], colour: str) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "base": [start for start, _, _, _ in bars],
        "x": [length for _, length, _, _ in bars],
        "y": [lane for _, _, lane, _ in bars],
        "customdata": [[words, start, start + length] for start, length, _, words in bars],
        "hovertemplate": "%{customdata[0]}<br>steps %{customdata[1]} to %{customdata[2]}"
        "<extra></extra>",
        "width": _LANE_BAR,
        "marker": {"color": colour, "line": {"width": 0}},
        "textposition": "none",
    }


def _alpha_lines(story: RunStory, lanes: Mapping[str, int], last: int) -> list[Trace]:
    x: list[int | None] = []
    y: list[float | None] = []
    alphas: list[float | None] = []
    for seed in story.seeds:
        points = seed.alpha_points(last if seed.end_step is None else seed.end_step)
        base = lanes[seed.slot] - _LANE_BAR / 2
        for step, alpha in points:
            x.append(step)
            y.append(base + alpha * _LANE_BAR)
            alphas.append(alpha)
        if points:  # a gap between two lives
            x.append(None)
            y.append(None)
            alphas.append(None)
    if not x:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "alpha",
            "x": x,
            "y": y,
            "customdata": alphas,
            "hovertemplate": "alpha %{customdata:.2f} at step %{x}<extra></extra>",
            "line": {"color": INK, "width": 1.8},
        }
    ]


def _ends(story: RunStory, lanes: Mapping[str, int]) -> list[Trace]:
    traces = []
    for name, stage, symbol, chosen in (
        ("committed", SeedStage.FOSSILIZED, "diamond", [s for s in story.seeds if s.committed]),
        (
            "pruned",
            SeedStage.PRUNED,
            "x-thin",
            [s for s in story.seeds if s.pruned_because is not None],
        ),
    ):
        if chosen:
            colour = STAGE_COLOURS[stage]
            outline = {"width": 3, "color": colour} if symbol == "x-thin" else {"width": 0}
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [seed.end_step for seed in chosen],
                    "y": [lanes[seed.slot] for seed in chosen],
                    "customdata": [
                        f"{seed.blueprint} {seed.outcome}: {seed.reason}" for seed in chosen
                    ],
                    "hovertemplate": "%{customdata}<extra></extra>",
                    "marker": {"symbol": symbol, "size": 12, "color": colour, "line": outline},
                }
            )
    return traces
