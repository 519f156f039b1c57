"""Pictures of how a policy learns."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from esper.lifecycle.stages import SeedStage
from esper.report.chart import (
    INK,
    QUIET,
    SEED_COLOURS,
    STAGE_COLOURS,
    Chart,
    Trace,
    layout_of,
    line_of,
)
from esper.report.light_charts import lightened
from esper.report.training_story import (
    RETURN,
    Rollout,
    TrainingStory,
    running_means,
    words_of,
)

_HOVER = "%{y:.4g} after %{x:,} decisions<extra>%{fullData.name}</extra>"


def training_charts(story: TrainingStory) -> list[Chart]:
    """Return every picture of a training that there is something to show in, most telling first."""
    charts = [
        _return_chart(story),
        _parts_chart(story),
        *(_final_chart(story, name) for name in story.finals),
        _course_chart(
            story,
            "entropy",
            title="Entropy",
            what="How open the policy's choices are, in nats; 0 is a policy that always does the "
            "same",
            unit="nats per decision",
        ),
        _course_chart(
            story,
            "approx_kl",
            title="How far each rollout moves the policy",
            what="KL divergence between the policy before and after the last pass",
            unit="nats per decision",
        ),
        _course_chart(
            story,
            "explained_variance",
            title="How well the value explains returns",
            what="Share of the returns' variance that the policy's own estimate explains; 1 is all "
            "of it, below 0 is worse than a constant",
            unit="explained variance",
        ),
    ]
    return [lightened(chart) for chart in charts if chart is not None]


def course_words(story: TrainingStory, name: str, *, signed: bool = False) -> str:
    """Return in words what a value was at first and is by now; empty if it was not measured."""
    found = story.first_and_last(name)
    if found is None:
        return ""
    first, last = (f"{value:{'+' if signed else ''}.4g}" for value in found)
    if story.window == 1:
        return f"from {first} in the first rollout to {last} in the last one"
    return f"from {first} over the first {story.window} rollouts to {last} over the last ones"


def _return_chart(story: TrainingStory) -> Chart | None:
    data = _lines(story, RETURN, each="mean of a rollout's episodes")
    if not data:
        return None
    restarts = len(story.restarts)
    told = {0: "", 1: " An environment was restarted once."}.get(
        restarts, f" Environments were restarted {restarts} times."
    )
    course = course_words(story, RETURN, signed=True)
    return Chart(
        key="return",
        title="Return",
        summary=f"Mean return of episodes, {course}.{told}",
        figure={
            "data": [*data, *_restart_marks(story)],
            "layout": _layout(y={"title": {"text": "return"}}),
        },
        wide=True,
    )


def _parts_chart(story: TrainingStory) -> Chart | None:
    """Return what each component has gained, as one of them may be a hundred times another."""
    data, courses = [], []
    for name, colour in zip(story.parts, cycle(SEED_COLOURS), strict=False):
        means = running_means(story.rollouts, name, window=story.window)
        if means:
            first, last = means[0][1], means[-1][1]
            gains = [(timesteps, mean - first) for timesteps, mean in means]
            data.append(_line(gains, words_of(name), colour, width=2.0))
            courses.append(f"{words_of(name)} {first:+.3g} to {last:+.3g}")
    if not data:
        return None
    over = "" if story.window == 1 else f", means over {story.window} rollouts"
    return Chart(
        key="return-parts",
        title="What each component of the return has gained",
        summary=f"Against what it was at first{over}: {'; '.join(courses)}.",
        figure={
            "data": data,
            "layout": _layout(y={"title": {"text": "gain in return"}, "zeroline": True}),
        },
    )


def _final_chart(story: TrainingStory, name: str) -> Chart | None:
    words = words_of(name)
    return _course_chart(
        story,
        name,
        title=f"{words[0].upper()}{words[1:]} at the end of episodes",
        what="Mean over the episodes that end in a rollout",
        unit=words,
    )


def _course_chart(
    story: TrainingStory,
    name: str,
    *,
    title: str,
    what: str,
    unit: str,
) -> Chart | None:
    """Return one value over decisions; None if it was not measured.

    Args:
        story: Has the value.
        name: Of the value.
        title: Of the chart.
        what: The value means, without a full stop.
        unit: At its axis.
    """
    data = _lines(story, name, each="each rollout")
    if not data:
        return None
    return Chart(
        key=name.replace("/", "-"),
        title=title,
        summary=f"{what}; {course_words(story, name)}.",
        figure={"data": data, "layout": _layout(y={"title": {"text": unit}})},
    )


def _lines(story: TrainingStory, name: str, *, each: str) -> list[Trace]:
    """Return a value of each rollout, and its running mean where that is another line."""
    points = [(r.timesteps, r.values[name]) for r in story.rollouts if name in r.values]
    if not points:
        return []
    if story.window == 1:
        return [_line(points, each, INK, width=2.2)]
    means = running_means(story.rollouts, name, window=story.window)
    lines = [_line(points, each, QUIET, width=1.0)]
    if means:
        lines.append(_line(means, f"mean of {story.window} rollouts", INK, width=2.2))
    return lines


def _line(points: Sequence[tuple[int, float]], name: str, colour: str, *, width: float) -> Trace:
    return {**line_of(points, name, colour, width=width), "hovertemplate": _HOVER}


def _restart_marks(story: TrainingStory) -> list[Trace]:
    """Return markers on the return where environments were restarted."""
    measured = [rollout for rollout in story.rollouts if RETURN in rollout.values]
    if not story.restarts or not measured:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "environment restarted",
            "x": [record.step for record, _ in story.restarts],
            "y": [_return_at(measured, record.epoch) for record, _ in story.restarts],
            "customdata": [event.reason for _, event in story.restarts],
            "hovertemplate": "after %{x:,} decisions: %{customdata}<extra></extra>",
            "marker": {
                "symbol": "x",
                "size": 10,
                "color": STAGE_COLOURS[SeedStage.PRUNED],
                "line": {"width": 1.5, "color": "var(--card)"},
            },
        }
    ]


def _return_at(measured: Sequence[Rollout], number: int) -> float:
    """Return the return of a rollout, or of the last one before it that had any."""
    before = [rollout for rollout in measured if rollout.number <= number] or measured[:1]
    return before[-1].values[RETURN]


def _layout(*, y: Mapping[str, Any]) -> dict[str, Any]:
    return layout_of(x={"title": {"text": "decisions"}, "exponentformat": "SI"}, y=y)
