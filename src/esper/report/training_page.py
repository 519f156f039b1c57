"""The report of the training of a policy: what it has learned, by which parts, and how steadily."""

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from esper.report.markup import chip, figures, settings_table, table, text
from esper.report.page import Section, page
from esper.report.run_page import STATUS_KINDS, duration
from esper.report.training_charts import training_charts
from esper.report.training_story import (
    FINAL,
    RETURN,
    TRAINING_WORDS,
    TrainingStory,
    mean_of,
    several,
    tell_training,
    training_facts,
    words_of,
)
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_reader import RunReader


def training_report(reader: RunReader) -> str:
    """Return the report of the training of a policy as a page of HTML.

    Args:
        reader: Of the training's folder; it may still be going on.

    Raises:
        ModuleNotFoundError: plotly is not installed.
        EventSchemaError: An event was written by another version.
        RunFolderError: The folder is damaged.
    """
    story, config, environment = tell_training(reader), reader.config(), reader.environment()
    task = str(config.get("task", "run"))
    standing = reader.standing
    status = chip(standing, STATUS_KINDS.get(standing, ""))
    return page(
        title=f"{task}: {TRAINING_WORDS}, {reader.folder.name}",
        heading=f"{escape(task)}, {TRAINING_WORDS} {status}",
        subheading=_subheading(reader, config, environment),
        lead=figures(training_figures(story)),
        charts=training_charts(story),
        sections=list(_sections(story, config, environment, failed=standing == "failed")),
    )


def training_title(task: str, story: TrainingStory) -> str:
    """Return what was trained, and the return at first and by now."""
    found = story.first_and_last(RETURN)
    told = (
        "no episode has ended yet" if found is None else "return {:+.4g} to {:+.4g}".format(*found)
    )
    return f"{task}, {TRAINING_WORDS} · {told}"


def training_figures(story: TrainingStory) -> list[tuple[str, str, str]]:
    """Return the figures that a person asks for first, each with its name and a remark."""
    return [
        *_course(story, RETURN, "return", "+.4f"),
        *_course(story, f"{FINAL}loss", "final loss", ".4f"),
        *_effort(story),
    ]


def _course(
    story: TrainingStory, name: str, words: str, form: str
) -> Iterator[tuple[str, str, str]]:
    found = story.first_and_last(name)
    if found is not None:
        first, last = (format(value, form) for value in found)
        over = "first rollout" if story.window == 1 else f"mean of {story.window} rollouts, first"
        yield words, last, f"{over} {first}"


def _effort(story: TrainingStory) -> Iterator[tuple[str, str, str]]:
    rollouts, restarts = several(len(story.rollouts), "rollout"), len(story.restarts)
    of_all = "" if story.planned_steps is None else f"of {story.planned_steps:,}, "
    yield "decisions", f"{story.timesteps:,}", f"{of_all}in {rollouts}"
    steps = mean_of(story.rollouts, "mean_episode_steps")
    each = "" if steps is None else f"of {steps:.4g} decisions"
    yield "episodes", f"{round(story.sum_of('episodes')):,}", each
    yield "restarts", f"{restarts:,}", "of environments" if restarts else "no environment ended"
    seconds = story.sum_of("seconds")
    if seconds > 0.0:
        collecting = 100.0 * story.sum_of("collect_seconds") / seconds
        yield "speed", f"{story.timesteps / seconds:.3g}/s", f"{collecting:.0f}% collecting"
        yield "time", duration(seconds), "of all rollouts"


def _subheading(
    reader: RunReader, config: Mapping[str, Any], environment: Mapping[str, Any]
) -> str:
    words = [*training_facts(config), f"on {environment.get('device')}"]
    return f"{escape(' · '.join(words))} · <code>{escape(reader.folder.name)}</code>"


def _sections(
    story: TrainingStory,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    failed: bool,
) -> Iterable[Section]:
    if failed and story.last_failure is not None:
        yield Section(title="Why it ended", body=f"<p>{escape(story.last_failure)}</p>")
    yield Section(title="At first and by now", body=_courses(story))
    yield Section(title="Environments that were restarted", body=_restarts(story))
    yield Section(
        title="Settings",
        body=settings_table(training_settings(config) or {}, caption="Settings of the training"),
        folded=True,
    )
    yield Section(
        title="Environment",
        body=settings_table(environment, caption="Where the training was made"),
        folded=True,
    )


def _courses(story: TrainingStory) -> str:
    if story.first_and_last(RETURN) is None:
        return "<p>No episode has ended yet.</p>"
    rows = []
    for name in (RETURN, *story.parts, *story.finals):
        first, last = story.first_and_last(name) or (None, None)
        if first is None or last is None:
            continue
        kind = "return, " if name in story.parts else "final "
        words = "return" if name == RETURN else f"{kind}{words_of(name)}"
        rows.append((escape(words), text(first), text(last), escape(f"{last - first:+.4g}")))
    window = story.window
    over = "rollout" if window == 1 else f"{window} rollouts"
    columns = ("mean over episodes", f"first {over}", f"last {over}", "change")
    return table(columns, rows, caption="What episodes came to", numbers=(1, 2, 3))


def _restarts(story: TrainingStory) -> str:
    if not story.restarts:
        return "<p>None: no environment ended before its time.</p>"
    rows = [
        (text(record.step), text(record.epoch), escape(event.reason))
        for record, event in story.restarts
    ]
    columns = ("decisions", "rollout", "why")
    return table(columns, rows, caption="Environments that were restarted", numbers=(0, 1))
