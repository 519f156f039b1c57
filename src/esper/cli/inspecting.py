"""`esper inspect`: the story of a run, from its folder."""

import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from esper.cli.compare_views import print_comparison, summary_record
from esper.cli.policy import policy_errors
from esper.cli.policy_views import evaluation_record, print_evaluation
from esper.cli.printing import plain_console, print_json_line
from esper.cli.tables import print_seeds, print_twin
from esper.cli.training_tables import print_training_story, training_records
from esper.cli.views import STAGE_STYLES
from esper.experiments.comparison import holds_comparison, read_comparison
from esper.experiments.series_folder import SeriesFolderError
from esper.lifecycle.events import EventSchemaError
from esper.lifecycle.stages import GROWTH_PATH
from esper.report.story import GateVisit, RunStory, SeedStory, StageVisit, tell_run
from esper.report.training_story import setting, tell_training
from esper.telemetry.progress import Unit
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.run_kind import EVALUATION_FILE, training_settings
from esper.telemetry.run_reader import RunReader

_MAX_INTERVENTIONS = 10
"""Lines on what a run was protected from."""

_CANNOT_SHOW = (
    RunFolderError,
    SeriesFolderError,
    EventSchemaError,
    ModuleNotFoundError,
    OSError,
)


def inspect(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder as grow, compare, policy train or policy eval print it."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every event, rollout or the table as JSON.")
    ] = False,
) -> None:
    """Tell what grew in RUN, when, and why: every gate decision with what it measured.

    Of a comparison, finished or not: the table and the verdict. Of an evaluation of policies: the
    table. Of the training of a policy: how it went, in ten rows, and which environments were
    restarted.
    """
    console = plain_console()
    try:
        if holds_comparison(run):
            _inspect_comparison(console, run, as_json=as_json)
            return
        if (run / EVALUATION_FILE).is_file():
            _inspect_evaluation(console, run, as_json=as_json)
            return
        reader = RunReader(run)
        if training_settings(reader.config()) is not None:
            _inspect_training(console, reader, as_json=as_json)
            return
        if as_json:
            for record in reader.events():
                print_json_line(console, record.model_dump(mode="json"))
            return
        story = tell_run(reader)
        _print_head(console, reader, story)
        for seed in story.seeds:
            _print_life(console, seed, story.unit)
        console.print()
        print_seeds(console, story)
        if story.finished is not None and story.twin is not None:
            console.print()
            print_twin(console, story.finished, story.twin)
    except _CANNOT_SHOW as error:
        raise typer.BadParameter(str(error)) from error


def _inspect_comparison(console: Console, folder: Path, *, as_json: bool) -> None:
    comparison = read_comparison(folder)
    if as_json:
        print_json_line(console, summary_record(comparison))
    else:
        print_comparison(console, comparison)


def _inspect_evaluation(console: Console, folder: Path, *, as_json: bool) -> None:
    with policy_errors():
        from esper.rl.evaluation import read_evaluation  # noqa: PLC0415 – an optional extra

        evaluation = read_evaluation(folder)
    if as_json:
        print_json_line(console, evaluation_record(evaluation))
        return
    print_evaluation(console, evaluation)
    if evaluation.missing():
        way_on = f"not finished: the same command with --out {shlex.quote(str(folder))} goes on"
        console.print(way_on, highlight=False, soft_wrap=True)


def _inspect_training(console: Console, reader: RunReader, *, as_json: bool) -> None:
    story = tell_training(reader)
    if as_json:
        for record in training_records(story):
            print_json_line(console, record)
    else:
        print_training_story(console, reader, story)


def _print_head(console: Console, reader: RunReader, story: RunStory) -> None:
    config, environment, finished = reader.config(), reader.environment(), story.finished
    task, policy = str(config.get("task", "run")), config.get("policy")
    names = [str(name) for name in (policy, reader.standing) if name is not None]
    console.print(Text.assemble((task, "bold"), *(f" · {name}" for name in names)))
    settings = _known(
        ("seed {}", config.get("random_seed")),
        ("{} epochs", setting(config, "trainer", "epochs")),
        ("learning rate {}", config.get("learning_rate")),
        ("on a bus as {}", setting(config, "bus", "commands") and reader.run_id),
    )
    torch = _known(("torch {}", setting(environment, "packages", "torch")))
    device = _known(("on {}", environment.get("device")))
    numerics = _known(
        ("{} threads", environment.get("torch_threads")),
        ("matmul {}", setting(environment, "matmul", "float32_matmul_precision")),
    )
    made = ", ".join(filter(None, (f"{torch} {device}".strip(), numerics)))
    sizes = _known(
        ("host {:,} parameters", story.host_param_count),
        ("grown {:,}", None if finished is None else finished.param_count),
    )
    metrics = {} if finished is None else finished.metrics
    tested = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    for line in ((settings, made), (sizes, tested and f"test {tested}")):
        told = "; ".join(filter(None, line))
        if told:
            console.print(told, highlight=False)
    _print_interventions(console, story)
    if story.failure is not None:
        console.print(Text(f"the run ended: {story.failure}", style="red"), soft_wrap=True)


def _known(*facts: tuple[str, object]) -> str:
    """Return facts in words, without those that the run did not tell."""
    return ", ".join(words.format(fact) for words, fact in facts if fact is not None)


def _print_interventions(console: Console, story: RunStory) -> None:
    """Print the last of what the run was protected from."""
    lines = list(_protected(story))
    earlier = len(lines) - _MAX_INTERVENTIONS
    if earlier > 0:
        console.print(f"{earlier:,} earlier interventions; --json has all", style="dim")
    for line in lines[-_MAX_INTERVENTIONS:]:
        console.print(line, style="red", highlight=False)


def _protected(story: RunStory) -> Iterator[str]:
    """Yield interventions in words; skips in a row for one reason are one."""
    for reason, alike in groupby(story.interventions, key=lambda met: met.skipped_because):
        met = list(alike)
        if reason is None:
            yield from (f"step {one.step}: {one.words}" for one in met)
        elif len(met) == 1:
            yield met[0].words
        else:
            yield f"{len(met):,} steps skipped, {met[0].step} to {met[-1].step}: {reason}"


def _order(visit: GateVisit | StageVisit) -> tuple[int, int, bool]:
    """Sort by step, then along the growth path, each gate before the stage it guards."""
    is_stage = isinstance(visit, StageVisit)
    stage = visit.stage if isinstance(visit, StageVisit) else visit.event.to_stage
    place = GROWTH_PATH.index(stage) if stage in GROWTH_PATH else len(GROWTH_PATH)
    return visit.step, place, is_stage


def _print_life(console: Console, seed: SeedStory, unit: Unit) -> None:
    blueprint, slot = (seed.blueprint, "bold"), (seed.slot, "bold")
    console.print()
    console.print(Text.assemble(blueprint, " in ", slot, f", {seed.param_count:,} parameters"))
    visits: list[GateVisit | StageVisit] = [*seed.gates, *seed.stages]
    visits.sort(key=_order)
    for visit in visits:
        when = f"  {unit} {visit.epoch:>3}  "
        if isinstance(visit, StageVisit):
            console.print(Text(when) + Text(visit.stage.name, style=STAGE_STYLES[visit.stage]))
        else:
            style = "" if visit.event.result.passed else "red"
            console.print(Text(when) + Text(str(visit.event.result), style=style))
    for measured in seed.contributions[-1:]:
        event = measured.event
        console.print(
            f"  {unit} {measured.epoch:>3}  held-out loss {event.loss_with:.4f} with it, "
            f"{event.loss_without:.4f} without",
            highlight=False,
        )
    if seed.committed:
        console.print(f"  {unit} {seed.end_epoch:>3}  committed", style="green")
    if seed.pruned_because is not None:
        console.print(f"  {unit} {seed.end_epoch:>3}  pruned: {seed.pruned_because}", style="red")
