"""A lane per slot, coloured by what its seeds went through."""

from collections.abc import Mapping

from esper.lifecycle.stages import SeedStage
from esper.report.chart import INK, STAGE_COLOURS, Chart, Series, Trace, growth_words, layout_of
from esper.report.story import RunStory

_LANE_HEIGHT = 58
_LANE_MARGIN = 96
_LANE_BAR = 0.64


def lanes_chart(story: RunStory, series: Series) -> Chart | None:
    """Return each slot's seeds by stage with their alpha; None if nothing grew."""
    if not story.slots or not story.seeds:
        return None
    last = max([story.last_step, *(points[-1][0] for points in series.values() if points)])
    lanes = {slot: len(story.slots) - 1 - index for index, slot in enumerate(story.slots)}
    data = [*_stage_bars(story, lanes, last), *_alpha_lines(story, lanes, last)]
    data += _ends(story, lanes)
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
        + " One lane per slot, coloured by stage; the line in it is alpha, from 0 at the lane's "
        "bottom to 1 at its top.",
        figure={"data": data, "layout": layout},
        wide=True,
    )


def _stage_bars(story: RunStory, lanes: Mapping[str, int], last: int) -> list[Trace]:
    bars: dict[SeedStage, list[tuple[int, int, int, str]]] = {}
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
        {
            "type": "bar",
            "orientation": "h",
            "name": stage.name.lower(),
            "base": [start for start, _, _, _ in bars[stage]],
            "x": [length for _, length, _, _ in bars[stage]],
            "y": [lane for _, _, lane, _ in bars[stage]],
            "customdata": [
                [words, start, start + length] for start, length, _, words in bars[stage]
            ],
            "hovertemplate": "%{customdata[0]}<br>steps %{customdata[1]} to %{customdata[2]}"
            "<extra></extra>",
            "width": _LANE_BAR,
            "marker": {"color": STAGE_COLOURS[stage], "line": {"width": 0}},
            "textposition": "none",
        }
        for stage in STAGE_COLOURS
        if stage in bars
    ]


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
