"""The report of one run: what grew, what it gave, what it cost, and why."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from esper.lifecycle.words import CHECKS, measured, needed, percent
from esper.report.chart import seed_name, si
from esper.report.charts import quality_names, run_charts
from esper.report.cost_charts import Reference
from esper.report.markup import chip, figures, settings_table, table, text
from esper.report.page import Section, page
from esper.report.story import GateVisit, RunStory, SeedStory, tell_run
from esper.telemetry.progress import Unit
from esper.telemetry.run_reader import MetricRow, RunReader

_CHECK = re.compile(rf"(?<=[:;] )(?:{'|'.join(CHECKS)})(?= )")
"""A check where the words of a refusal name one."""
_OUTCOMES = {"committed": "good", "pruned": "bad", "still growing": "warn"}
STATUS_KINDS = {
    "finished": "good",
    "failed": "bad",
    "killed": "bad",
    "running": "warn",
    "interrupted": "warn",
    "stopped": "warn",
}


def run_report(reader: RunReader, *, references: Sequence[Reference] = ()) -> str:
    """Return the report of a run as a page of HTML.

    Args:
        reader: Of the run's folder; it may still be going on.
        references: Networks that its cost and quality are shown beside.

    Raises:
        ModuleNotFoundError: plotly is not installed.
        EventSchemaError: An event was written by another version.
        RunFolderError: The folder is damaged.
    """
    story, metrics = tell_run(reader), reader.metrics()
    config, environment = reader.config(), reader.environment()
    task = str(config.get("task", "run"))
    standing = reader.standing
    heading = f"{escape(task)} {chip(standing, STATUS_KINDS.get(standing, ''))}"
    return page(
        title=f"{task}: {reader.folder.name}",
        heading=heading,
        subheading=_subheading(reader, story, config, environment),
        lead=figures(_key_figures(story, metrics)),
        charts=run_charts(story, metrics, references=references),
        sections=list(_sections(story, config, environment)),
    )


def _subheading(
    reader: RunReader,
    story: RunStory,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    words = [
        f"policy {config.get('policy')}",
        f"random seed {config.get('random_seed')}",
        f"on {environment.get('device')}",
    ]
    words = [word for word in words if not word.endswith(" None")]  # a run of somebody's own loop
    if story.first_seconds is not None:
        words.append(f"{datetime.fromtimestamp(story.first_seconds, UTC):%Y-%m-%d %H:%M} UTC")
    return f"{escape(' · '.join(words))} · <code>{escape(reader.folder.name)}</code>"


def _key_figures(story: RunStory, metrics: Sequence[MetricRow]) -> Iterable[tuple[str, str, str]]:
    if story.finished is not None:
        for name, value in story.finished.metrics.items():
            yield f"test {name.replace('_', ' ')}", f"{value:.4f}", _held_out(metrics, name)
    else:
        for name in ("loss", *quality_names(metrics)):
            values = [row.value for row in metrics if row.name == name]
            if values:
                yield f"held-out {name}", f"{values[-1]:.4f}", "last measured"
    yield from _parameters(story)
    pruned = sum(seed.outcome == "pruned" for seed in story.seeds)
    yield "seeds committed", str(len(story.committed)), f"of {len(story.seeds)}, {pruned} pruned"
    flops = [row.value for row in metrics if row.name == "flops"]
    if flops:
        yield "operations", si(flops[-1]), "training and deciding"
    steps = max([story.last_step, *(row.step for row in metrics)])
    epochs = max((row.epoch for row in metrics), default=0)
    yield "steps", f"{steps:,}", f"{epochs:,} decisions"
    if story.seconds is not None:
        yield "time", duration(story.seconds), "wall clock"


def _parameters(story: RunStory) -> Iterable[tuple[str, str, str]]:
    """Yield the size of the network that was tested; of a run that goes on, with living seeds."""
    host, finished, living = story.host_param_count, story.finished, story.living_param_count
    if finished is None and host is None:
        return
    now = story.param_counts[-1][1] if finished is None else finished.param_count
    remarks = [f"from {host:,}, {100.0 * (now / host - 1.0):+.0f} %"] if host else []
    if finished is not None and living:
        remarks.append(f"+{living:,} still growing, not tested")
    yield "parameters", f"{now:,}", "; ".join(remarks)


def _held_out(metrics: Sequence[MetricRow], name: str) -> str:
    values = [row.value for row in metrics if row.name == name and math.isfinite(row.value)]
    return f"held out {values[-1]:.4f}" if values else ""


def duration(seconds: float) -> str:
    """Return a time in its two largest units; none for one below 0, of a clock that was set."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sections(
    story: RunStory, config: Mapping[str, Any], environment: Mapping[str, Any]
) -> Iterable[Section]:
    if story.failure is not None:
        yield Section(title="Why it ended", body=f"<p>{escape(story.failure)}</p>")
    if story.twin is not None and story.finished is not None:
        yield Section(title="Did growth pay?", body=_twin(story))
    yield Section(title="Seeds", body=_seeds(story))
    yield Section(title="Why: every decision of the gates", body=_decisions(story))
    yield Section(title="What the governor did", body=_interventions(story))
    yield Section(
        title="Settings", body=settings_table(config, caption="Settings of the run"), folded=True
    )
    yield Section(
        title="Environment",
        body=settings_table(environment, caption="Where the run was made"),
        folded=True,
    )


def _twin(story: RunStory) -> str:
    twin, finished = story.twin, story.finished
    assert twin is not None
    assert finished is not None
    verdict = _verdict(finished.metrics["loss"], twin.metrics["loss"])
    rows = [
        ("grown", text(finished.param_count), *(text(v) for v in finished.metrics.values())),
        ("its twin", text(twin.param_count), *(text(v) for v in twin.metrics.values())),
    ]
    columns = ("network", "parameters", *(f"test {name}" for name in finished.metrics))
    return (
        f"<p>{verdict} that of its twin, which never grew, had "
        f"{twin.epochs:,} epochs for {twin.flops_fraction:.2f} of the run's operations, and is "
        f"the same run up to step {twin.shared_steps:,}. One random seed is no proof.</p>"
        + table(columns, rows, caption="The run and its twin", numbers=range(1, len(columns)))
    )


def _verdict(loss: float, twins: float) -> str:
    """Return whether growth paid, and the beginning of a sentence that ends with the twin's."""
    begins = "The grown network's test loss is"
    if not (math.isfinite(loss) and math.isfinite(twins)):
        verdict = chip("whether growth paid cannot be told", "warn")
        return f"{verdict} {begins} {loss:.4g}, and {twins:.4g} is"
    paid = loss < twins
    verdict = chip("growth paid", "good") if paid else chip("growth did not pay", "bad")
    difference = abs(loss - twins)
    shown = f"{difference / abs(twins):.1%}" if twins else f"{difference:.4g}"
    return f"{verdict} {begins} {shown} {'below' if paid else 'above'}"


def _seeds(story: RunStory) -> str:
    if not story.seeds:
        return "<p>Nothing grew.</p>"
    rows = [
        (
            f"<code>{escape(seed.slot)}</code>",
            escape(seed.blueprint),
            text(seed.param_count),
            escape(_span(seed)),
            chip(seed.outcome, _OUTCOMES[seed.outcome]),
            escape(percent(seed.contribution_fraction)) or "–",
            _explained(seed.reason),
        )
        for seed in story.seeds
    ]
    columns = ("slot", "seed", "parameters", f"{story.unit}s", "outcome", "saves", "why")
    return table(columns, rows, caption="Every seed and what became of it", numbers=(2, 5))


def _explained(words: str) -> str:
    """Return words as HTML in which each check that they name says what it measures."""
    return _CHECK.sub(lambda found: _check_name(found[0]), escape(words))


def _check_name(name: str, shown: str | None = None) -> str:
    """Return the name of a gate's check, with what it measures for who points at it."""
    meaning = CHECKS.get(name)
    told = escape(shown or name)
    return told if meaning is None else f'<abbr title="{escape(meaning)}">{told}</abbr>'


def _span(seed: SeedStory) -> str:
    return f"{seed.epoch}–{'' if seed.end_epoch is None else seed.end_epoch}"


def _decisions(story: RunStory) -> str:
    if not story.seeds:
        return "<p>Nothing was judged.</p>"
    return "".join(_life(seed, story.unit) for seed in story.seeds)


def _life(seed: SeedStory, unit: Unit) -> str:
    passed = [visit.event.result.gate for visit in seed.gates if visit.event.result.passed]
    refused = sum(not visit.event.result.passed for visit in seed.gates)
    times = {0: "never refused", 1: "refused once"}.get(refused, f"refused {refused:,} times")
    words = f"passed {', '.join(passed) or 'none'}; {times}"
    rows = [row for visit in seed.gates for row in _checks(visit)]
    columns = (unit, "gate", "check", "measured", "needed", "verdict")
    name = seed_name(seed, unit)
    return (
        f"<details><summary><h3>{escape(name)}</h3> "
        f"{chip(seed.outcome, _OUTCOMES[seed.outcome])} "
        f'<span class="quiet">{escape(words)}</span></summary>'
        f"{table(columns, rows, caption=f'Gates of {name}', numbers=(0, 3))}</details>"
    )


def _checks(visit: GateVisit) -> Iterable[tuple[str, ...]]:
    result = visit.event.result
    for index, check in enumerate(result.checks):
        first = index == 0
        forced = " (forced)" if result.forced and first else ""
        yield (
            text(visit.epoch) if first else "",
            f"{escape(result.gate)}{forced}" if first else "",
            _check_name(check.name, check.name.replace("_", " ")),
            measured(check),
            escape(needed(check)),
            chip("passes", "good") if check.passed else chip("fails", "bad"),
        )


def _interventions(story: RunStory) -> str:
    if not story.interventions:
        return "<p>Nothing: no step was refused, and no seed harmed the run.</p>"
    rows = [(text(met.step), text(met.epoch), escape(met.words)) for met in story.interventions]
    return table(
        ("step", story.unit, "what"),
        rows,
        caption="What the run was protected from",
        numbers=(0, 1),
    )
