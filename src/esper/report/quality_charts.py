"""Held-out loss and metrics over time, with what grew and left."""

from collections.abc import Sequence

from esper.lifecycle.stages import SeedStage
from esper.report.chart import (
    INK,
    QUIET,
    STAGE_COLOURS,
    Chart,
    Series,
    Trace,
    growth_words,
    layout_of,
    line_of,
    log_axis,
    seed_name,
)
from esper.report.story import RunStory


def loss_chart(story: RunStory, series: Series) -> Chart | None:
    """Return training and held-out loss over time; None if there is neither."""
    held_out, training = series.get("loss", ()), series.get("train_loss", ())
    if not held_out and not training:
        return None
    lines = [
        line_of(training, "training", QUIET, width=1.3),
        line_of(held_out, "held out", INK, width=2.2),
    ]
    data = [line for line in lines if line["x"]] + _event_marks(story, held_out or training)
    layout = layout_of(y=log_axis("loss", (value for _, value in [*held_out, *training])))
    return Chart(
        key="loss",
        title="Loss",
        summary=f"{_course('Held-out loss', held_out)} {growth_words(story)}",
        figure={"data": data, "layout": layout},
    )


def quality_chart(story: RunStory, series: Series, name: str) -> Chart | None:
    """Return a held-out metric over time; None if it was not measured."""
    points = series.get(name, ())
    if not points:
        return None
    title = name.replace("_", " ")
    data = [line_of(points, "held out", INK, width=2.2), *_event_marks(story, points)]
    return Chart(
        key=f"quality-{name}",
        title=title.capitalize(),
        summary=_course(f"Held-out {title}", points),
        figure={"data": data, "layout": layout_of(y={"title": {"text": title}})},
    )


def _event_marks(story: RunStory, points: Sequence[tuple[int, float]]) -> list[Trace]:
    """Return markers on a curve where seeds germinated, were committed and were pruned."""
    kinds = {
        "germinated": ("triangle-up", STAGE_COLOURS[SeedStage.TRAINING]),
        "committed": ("diamond", STAGE_COLOURS[SeedStage.FOSSILIZED]),
        "pruned": ("x", STAGE_COLOURS[SeedStage.PRUNED]),
    }
    marks: dict[str, list[tuple[int, float, str]]] = {}
    for seed in story.seeds:
        name = seed_name(seed, story.unit)
        marks.setdefault("germinated", []).append((*_on_curve(points, seed.step), name))
        if seed.end_step is not None:
            marks.setdefault(seed.outcome, []).append((*_on_curve(points, seed.end_step), name))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": kind,
            "x": [step for step, _, _ in marks[kind]],
            "y": [value for _, value, _ in marks[kind]],
            "customdata": [f"{name} {kind}" for _, _, name in marks[kind]],
            "hovertemplate": "%{customdata}, step %{x}<extra></extra>",
            "marker": {
                "symbol": symbol,
                "size": 10,
                "color": colour,
                "line": {"width": 1.5, "color": "var(--card)"},
            },
        }
        for kind, (symbol, colour) in kinds.items()
        if kind in marks
    ]


def _on_curve(points: Sequence[tuple[int, float]], step: int) -> tuple[int, float]:
    """Return a step with the curve's value there, or at its nearest end."""
    before = points[0]
    for point in points:
        if point[0] >= step:
            span = point[0] - before[0]
            share = (step - before[0]) / span if span > 0 and step > before[0] else 1.0
            return step, before[1] + share * (point[1] - before[1])
        before = point
    return step, points[-1][1]


def _course(what: str, points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return f"{what} was not measured."
    (first_step, first), (last_step, last) = points[0], points[-1]
    if first_step == last_step:
        return f"{what} is {last:.4g} at step {last_step:,}."
    return (
        f"{what} goes from {first:.4g} at step {first_step:,} to {last:.4g} at step {last_step:,}."
    )
