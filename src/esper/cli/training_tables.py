"""The training of a policy in a terminal: how it stands, and how it got there."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.views import WIDE_COLUMNS
from esper.report.run_page import duration
from esper.report.training_charts import course_words
from esper.report.training_story import (
    FINAL,
    PART,
    RETURN,
    TRAINING_WORDS,
    Rollout,
    TrainingStory,
    mean_of,
    several,
    training_facts,
    words_of,
)
from esper.telemetry.run_reader import RunReader

_MAX_ROWS = 10
_MAX_RESTARTS = 10
_THOUSAND = 1000.0
_ROOM_FOR_MORE = 100
"""Columns from which on there is room for what is of interest second."""
_COUNTS = ("rollout", "timesteps", "total_steps", "episodes", "restarts")
_SECOND = frozenset({f"{FINAL}committed", f"{FINAL}param_count", "episodes"})


def print_training_story(console: Console, reader: RunReader, story: TrainingStory) -> None:
    """Print how a training stands, why it failed, its course in some ten rows, and restarts."""
    config, environment = reader.config(), reader.environment()
    task, standing = (str(config.get("task")), "bold"), reader.standing
    console.print(Text.assemble(task, f" · {TRAINING_WORDS} · {standing}"))
    torch = environment.get("packages", {}).get("torch")
    facts = [*training_facts(config), f"torch {torch} on {environment.get('device')}"]
    console.print(Text(", ".join(facts)))
    console.print(Text(_standing(story)))
    if story.first_and_last(RETURN) is not None:
        console.print(Text(f"return {course_words(story, RETURN, signed=True)}"))
    if standing == "failed" and story.last_failure is not None:
        failure = Text(f"the training ended: {story.last_failure}", style="red")
        console.print(failure, soft_wrap=True)
    if story.rollouts:
        console.print()
        _print_course(console, story)
    _print_restarts(console, story)


def training_records(story: TrainingStory) -> Iterator[dict[str, Any]]:
    """Yield each rollout as `esper policy train --json` has it, and each restart as its event.

    What was not measured, or was not finite, is None. Of the problems of a rollout a folder has
    the restarts.
    """
    reasons: dict[int, list[str]] = {}
    for stamped, event in story.restarts:
        reasons.setdefault(stamped.epoch, []).append(event.reason)
    names = dict.fromkeys([RETURN, "mean_episode_steps", *story.names])
    plain = [name for name in names if not name.startswith((PART, FINAL))]
    records = [
        (each.number, 0, _rollout_record(each, plain, reasons.get(each.number, [])))
        for each in story.rollouts
    ]
    records += [
        (record.epoch, 1, {"kind": "event", **record.model_dump(mode="json")})
        for record, _ in story.restarts
    ]
    for _, _, record in sorted(records, key=lambda numbered: numbered[:2]):
        yield record


def _rollout_record(
    rollout: Rollout, names: Sequence[str], problems: Sequence[str]
) -> dict[str, Any]:
    values = rollout.values
    plain = {name: values.get(name) for name in names}
    counts = {name: round(values[name]) for name in _COUNTS if name in values}
    nested = {"return_parts": _below(PART, values), "final": _below(FINAL, values)}
    return {"kind": "rollout", **plain, **counts, **nested, "problems": problems}


def _below(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {n.removeprefix(prefix): value for n, value in values.items() if n.startswith(prefix)}


def _standing(story: TrainingStory) -> str:
    total = "" if story.planned_steps is None else f" of {story.planned_steps:,}"
    parts = [
        f"{story.timesteps:,}{total} decisions",
        several(len(story.rollouts), "rollout"),
        several(round(story.sum_of("episodes")), "episode"),
        several(len(story.restarts), "restart"),
    ]
    seconds = story.sum_of("seconds")
    if seconds > 0.0:
        parts += [duration(seconds), f"{story.timesteps / seconds:.3g} decisions per second"]
    return ", ".join(parts)


def _print_course(console: Console, story: TrainingStory) -> None:
    """Print means over rollouts in a row: a table, or lines if narrow."""
    rollouts = story.rollouts
    number = min(_MAX_ROWS, len(rollouts))
    ends = [len(rollouts) * index // number for index in range(number + 1)]
    rows = [rollouts[start:end] for start, end in pairwise(ends)]
    names = [name for name in _columns(story) if mean_of(rollouts, name) is not None]
    if console.width < WIDE_COLUMNS:
        for row in rows:
            values = ", ".join(f"{_heading(name)} {_cell(row, name)}" for name in names)
            console.print(Text(f"{_numbers(row)}, {row[-1].timesteps:,} decisions: {values}"))
        return
    if console.width < _ROOM_FOR_MORE:
        names = [name for name in names if name not in _SECOND]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rollout", no_wrap=True)
    for heading in ("decisions", *map(_heading, names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(row, name) for name in names]
        table.add_row(_numbers(row), f"{row[-1].timesteps:,}", *cells)
    console.print(table)
    if len(rollouts) > number:
        console.print("means over the rollouts of a row", style="dim")


def _columns(story: TrainingStory) -> list[str]:
    return [RETURN, *story.finals, "episodes", "entropy", "approx_kl", "explained_variance"]


def _heading(name: str) -> str:
    known = {RETURN: "return", "approx_kl": "KL", "explained_variance": "explained"}
    known |= {f"{FINAL}committed": "committed", f"{FINAL}param_count": "params"}
    return known.get(name) or words_of(name)


def _numbers(row: Sequence[Rollout]) -> str:
    first, last = row[0].number, row[-1].number
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _cell(row: Sequence[Rollout], name: str) -> str:
    mean = mean_of(row, name)
    if mean is None:
        return "–"
    if name == RETURN:
        return f"{mean:+.4f}"
    if name == "episodes":
        return f"{sum(rollout.values.get(name, 0.0) for rollout in row):,.0f}"
    return f"{mean:,.0f}" if abs(mean) >= _THOUSAND else f"{mean:.4f}"


def _print_restarts(console: Console, story: TrainingStory) -> None:
    """Print the last restarts of environments."""
    if not story.restarts:
        return
    earlier = len(story.restarts) - _MAX_RESTARTS
    console.print()
    if earlier > 0:
        console.print(f"{earlier:,} earlier restarts; --json has all", style="dim")
    for record, event in story.restarts[-_MAX_RESTARTS:]:
        console.print(Text(f"restarted by {record.step:,} decisions: {event.reason}", "yellow"))
