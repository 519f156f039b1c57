"""`esper compare`: does growth pay on a task?"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from esper.cli.command_line import command_line
from esper.cli.compare_views import (
    CompareView,
    JsonCompareView,
    LinesCompareView,
    LiveCompareView,
    QuietCompareView,
    print_comparison,
    summary_record,
)
from esper.cli.options import (
    AsJson,
    ConfigFile,
    DryRun,
    Report,
    bad_parameter,
    new_folder,
    print_settings,
    refuse_both,
    refuse_changes,
    refuse_neither,
    run_settings,
    settings_asked,
)
from esper.cli.printing import lasting_console, plain_console, print_json_line
from esper.cli.report import leave_report
from esper.cli.stopping import EXIT_INTERRUPTED, tell_interrupted
from esper.experiments.comparison import (
    MIN_SEEDS_FOR_A_CLAIM,
    CompareConfig,
    Comparison,
    ComparisonFolder,
    check_runs,
    comparison_charts,
    comparison_title,
    holds_comparison,
    run_missing,
)
from esper.experiments.config import RunConfig
from esper.experiments.parts import chosen_policy
from esper.experiments.series_folder import SeriesFolderError
from esper.experiments.settings import SettingsError, explain
from esper.experiments.worker_pool import WorkerDiedError
from esper.report import draw_charts
from esper.tasks.task import TaskDataError

_OF_ANY_START = frozenset({"out", "processes", "report", "quiet", "as_json", "dry_run"})
"""Options that a comparison begun before still takes; its settings are kept in its folder."""

_CANNOT_BE_MADE = (SeriesFolderError, SettingsError, TaskDataError, ModuleNotFoundError)


def compare(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK", help="What to train, as for esper grow; a folder begun before knows."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Who grows; the first is judged, more are arms beside it. Repeatable.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=2, help="Random seeds, the same for every arm.")
    ] = MIN_SEEDS_FOR_A_CLAIM,
    first_seed: Annotated[int, typer.Option(help="The lowest of them.")] = 0,
    rates: Annotated[
        int, typer.Option(min=1, help="Learning rates that every arm tries; 1 searches none.")
    ] = 3,
    search_seeds: Annotated[
        int, typer.Option(min=1, help="Seeds that a learning rate is chosen on.")
    ] = 1,
    equal_flops: Annotated[
        bool,
        typer.Option(
            "--equal-flops/--no-equal-flops",
            help="Arms at the compute of the largest as well; else growth pays per step at most.",
        ),
    ] = True,
    sizes: Annotated[
        bool, typer.Option("--sizes/--no-sizes", help="Every size in between from the start.")
    ] = True,
    random_times: Annotated[
        bool, typer.Option("--random-times/--no-random-times", help="Growth at random times.")
    ] = True,
    epochs: Annotated[int | None, typer.Option(min=1, help="Length of a run.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to train, as for esper grow.")] = None,
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, as for esper grow."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder; default runs/compare-TASK-TIME. One begun before goes on where it was."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default one per CPU.")
    ] = None,
    report: Report = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the folder only.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train TASK's network grown and at every size from the start: does growth pay?"""
    refuse_both(quiet=quiet, as_json=as_json)
    if task is not None:
        asked = settings_asked(epochs=epochs, policy=policy[0] if policy else None, device=device)
        settings = _settings(
            run_settings(task, config, set_, asked),
            policies=tuple(policy[1:]) if policy else (),
            random_seeds=tuple(range(first_seed, first_seed + seeds)),
            search_rates=rates,
            search_seeds=search_seeds,
            equal_flops=equal_flops,
            intermediate_sizes=sizes,
            random_times=random_times,
        )
    else:
        settings = _kept(context, out)
    if dry_run:
        print_settings(plain_console(), settings, as_json=as_json)
        return
    console = lasting_console()
    folder = _open(new_folder(out, settings.run.task, kind="compare-"), settings)
    view = _view(console, settings, quiet=quiet, as_json=as_json)
    try:
        comparison = _run(folder, settings, view, processes or os.cpu_count() or 1)
    except KeyboardInterrupt:
        if not (quiet or as_json):
            print_comparison(console, Comparison(settings, folder.runs()))
        tell_interrupted(_way_on(folder))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    told = _leave(folder, comparison, with_report=report)
    _print(console, folder, comparison, told, quiet=quiet, as_json=as_json)


def _kept(context: typer.Context, folder: Path | None) -> CompareConfig:
    """Return the settings of the comparison that is to go on.

    Raises:
        typer.BadParameter: No folder is named, it holds none, or options would change its settings.
    """
    if folder is None:
        refuse_neither()
    sources = {name: context.get_parameter_source(name) for name in context.params}
    refuse_changes(
        str(folder),
        [
            name
            for name, source in sources.items()
            if name not in _OF_ANY_START and source is not None and source.name != "DEFAULT"
        ],
    )
    try:
        return ComparisonFolder.config_of(folder)
    except SeriesFolderError as error:
        raise typer.BadParameter(f"{error}; name a task to begin one there") from error


def _settings(run: RunConfig, **chosen: Any) -> CompareConfig:
    with bad_parameter(SettingsError):
        for name in (run.policy, *chosen["policies"]):
            chosen_policy(run.model_copy(update={"policy": name}))
    try:
        return CompareConfig(run=run, **chosen)
    except ValidationError as error:
        raise typer.BadParameter(explain(error, CompareConfig)) from error


def _view(console: Console, settings: CompareConfig, *, quiet: bool, as_json: bool) -> CompareView:
    if quiet:
        return QuietCompareView()
    if as_json:
        return JsonCompareView(console)
    if console.is_terminal:
        return LiveCompareView(console, settings)
    return LinesCompareView(console)


def _open(path: Path, settings: CompareConfig) -> ComparisonFolder:
    """Return the folder, begun if there was none: only where its runs can be made."""
    with bad_parameter(*_CANNOT_BE_MADE):
        if not holds_comparison(path):
            check_runs(settings)
        return ComparisonFolder(path, settings)


def _run(
    folder: ComparisonFolder, settings: CompareConfig, view: CompareView, processes: int
) -> Comparison:
    """Make the runs that are missing, and show how far they are."""
    try:
        with bad_parameter(*_CANNOT_BE_MADE), view:
            return run_missing(settings, folder, processes=processes, on_change=view.change)
    except WorkerDiedError as error:
        typer.echo(f"{error}\n{_way_on(folder)}", err=True)
        raise typer.Exit(1) from error


def _leave(folder: ComparisonFolder, comparison: Comparison, *, with_report: bool) -> list[str]:
    """Write summary, picture and report into the folder, and return a line on each to look at."""
    folder.summarise(summary_record(comparison))
    told = [f"picture     {folder.picture}"]
    try:
        draw_charts(comparison_title(comparison), comparison_charts(comparison), folder.picture)
    except (ModuleNotFoundError, ValueError) as error:
        told = [f"no picture: {error}"]
    if with_report:
        told.append(leave_report(folder.path))
    return [*told, f"folder      {folder.path}"]


def _print(
    console: Console,
    folder: ComparisonFolder,
    comparison: Comparison,
    told: Sequence[str],
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    if quiet:
        console.out(str(folder.path), highlight=False)
    elif as_json:
        summary = {"kind": "summary", "folder": str(folder.path), **summary_record(comparison)}
        print_json_line(console, summary)
    else:
        print_comparison(console, comparison)
        console.print()
        for line in told:
            console.print(line, soft_wrap=True)


def _way_on(folder: ComparisonFolder) -> str:
    return f"go on with: {command_line('compare', '--out', folder.path)}"
