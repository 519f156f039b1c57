"""Several runs beside each other: their curves, their figures, and what was set differently."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.dashboard.seed_story import seed_story
from esper.dashboard.watched_run import RunRow
from esper.report.chart import Chart, layout_of, line_of, log_axis
from esper.report.charts import quality_names
from esper.report.cost_charts import losses_over_flops
from esper.report.story import RunStory
from esper.report.training_story import RETURN, TrainingStory, running_means
from esper.telemetry.run_reader import MetricRow, RunReader

MAX_COMPARED = 8
"""More lines cannot be told apart by colour."""
_ABSENT = "–"

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One column of the comparison.

    Attributes:
        colour: Of its lines.
        params: Of the finished network, or of the host with what was committed so far.
        flops: So far; None where they are not counted.
    """

    row: RunRow
    colour: str
    params: int | None
    flops: float | None
    metrics: dict[str, float]
    test_metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting that is not the same in all runs.

    Attributes:
        name: As `--set` takes it.
        values: One per run, as JSON has them.
    """

    name: str
    values: list[Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that is shown of several runs."""

    runs: list[ComparedRun]
    settings: list[Setting]
    charts: list[Chart]


def compare(chosen: Sequence[tuple[RunRow, Path]]) -> Comparison:
    """Return runs beside each other, in the given order.

    Args:
        chosen: At most `MAX_COMPARED`.

    Raises:
        ValueError: There are more.
        RunFolderError: A run cannot be read.
        EventSchemaError: An event was written by another version.
    """
    if len(chosen) > MAX_COMPARED:
        raise ValueError(f"at most {MAX_COMPARED} runs can be compared, got {len(chosen)}")
    readers = [RunReader(folder) for _, folder in chosen]
    metrics = [reader.metrics() for reader in readers]
    runs = [
        _compared(row, reader, values, f"var(--run-{index + 1})")
        for index, ((row, _), reader, values) in enumerate(
            zip(chosen, readers, metrics, strict=True)
        )
    ]
    return Comparison(
        runs=runs,
        settings=differing([reader.config() for reader in readers]),
        charts=list(_charts(runs, metrics)),
    )


def _compared(
    row: RunRow, reader: RunReader, values: Sequence[MetricRow], colour: str
) -> ComparedRun:
    last = {value.name: value.value for value in values}
    story = seed_story(reader)
    return ComparedRun(
        row=row,
        colour=colour,
        params=_params(story),
        flops=last.get("flops"),
        metrics={name: last[name] for name in _held_out(row, values) if name in last},
        test_metrics={} if story.finished is None else story.finished.metrics,
    )


def _params(story: RunStory) -> int | None:
    """Return the parameters of host and committed seeds; None where the host's are not known."""
    if story.finished is not None:
        return story.finished.param_count
    if story.host_param_count is None:
        return None
    return story.host_param_count + sum(s.param_count for s in story.seeds if s.committed)


def _held_out(row: RunRow, values: Sequence[MetricRow]) -> list[str]:
    """Return the held-out values of a run; a training of a policy has none of its own."""
    return [] if row.kind == "training" else ["loss", *quality_names(values)]


def differing(configs: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Return the settings that are not the same in all, in the first one's order.

    >>> differing([{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}])
    [Setting(name='b.c', values=[2, 3])]
    """
    flat = [dict(_flat(config)) for config in configs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, _ABSENT) for settings in flat]) for name in names]
    return [
        Setting(name=name, values=values)
        for name, values in rows
        if any(value != values[0] for value in values)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _charts(runs: Sequence[ComparedRun], metrics: Sequence[Sequence[MetricRow]]) -> Iterator[Chart]:
    if any(run.row.kind == "training" for run in runs):
        returns = [_returns(run.row, values) for run, values in zip(runs, metrics, strict=True)]
        title = "Mean return of episodes, running mean"
        yield _overlaid("return", title, runs, returns, y="return", x="decisions")
    if all(run.row.kind == "training" for run in runs):
        return
    losses = [
        [] if run.row.kind == "training" else _points(values, "loss")
        for run, values in zip(runs, metrics, strict=True)
    ]
    yield _overlaid("loss", "Held-out loss", runs, losses, y="loss")
    spent = [
        [] if run.row.kind == "training" else [point[:2] for point in losses_over_flops(values)]
        for run, values in zip(runs, metrics, strict=True)
    ]
    if any(spent):
        yield _overlaid(
            "flops",
            "Held-out loss against compute",
            runs,
            spent,
            y="loss",
            x="floating-point operations",
        )
    names = [_held_out(run.row, values) for run, values in zip(runs, metrics, strict=True)]
    for name in dict.fromkeys(name for each in names for name in each if name != "loss"):
        title = name.replace("_", " ")
        points = [
            _points(values, name) if name in each else []
            for values, each in zip(metrics, names, strict=True)
        ]
        yield _overlaid(f"quality-{name}", title.capitalize(), runs, points, y=title)


def _returns(row: RunRow, values: Sequence[MetricRow]) -> Points:
    """Return the course of a training; nothing of any other run."""
    if row.kind != "training":
        return []
    story = TrainingStory()
    story.take_values(values)
    return list(running_means(story.rollouts, RETURN, window=story.window))


def _points(values: Sequence[MetricRow], name: str) -> Points:
    return [
        (value.step, value.value)
        for value in values
        if value.name == name and math.isfinite(value.value)
    ]


def _overlaid(
    key: str,
    title: str,
    runs: Sequence[ComparedRun],
    curves: Sequence[Points],
    *,
    y: str,
    x: str = "optimizer step",
) -> Chart:
    lines = [
        line_of(points, run.row.id, run.colour, width=2.0)  # type: ignore[arg-type]
        for run, points in zip(runs, curves, strict=True)
    ]
    for line in lines:
        line["hovertemplate"] = f"%{{y:.4g}} at {x} %{{x:.4s}}<extra>%{{fullData.name}}</extra>"
    values = [value for points in curves for _, value in points]
    axis = log_axis(y, values) if y == "loss" else {"title": {"text": y}}
    layout = layout_of(x={"title": {"text": x}}, y=axis, height=360)
    ends = [(points[-1][1], run.row.id) for run, points in zip(runs, curves, strict=True) if points]
    told = ", ".join(f"{run_id} {value:.4g}" for value, run_id in sorted(ends))
    return Chart(
        key=key,
        title=title,
        summary=f"The last values: {told}." if told else "Nothing was measured yet.",
        figure={"data": [line for line in lines if line["x"]], "layout": layout},
    )
