"""`esper compare`: does growth pay on a task?"""

import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from esper.cli.compare_views import (
    CompareView,
    JsonCompareView,
    LinesCompareView,
    LiveCompareView,
    QuietCompareView,
    print_comparison,
    summary_record,
)
from esper.cli.grow import folder_name, only_task, program
from esper.cli.report import leave_report
from esper.experiments.comparison import (
    MIN_SEEDS_FOR_A_CLAIM,
    CompareConfig,
    Comparison,
    ComparisonFolder,
    ComparisonFolderError,
    check_runs,
    comparison_charts,
    comparison_title,
    holds_comparison,
    run_missing,
)
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import chosen_policy, usable_device
from esper.experiments.settings import SettingsError
from esper.experiments.worker_pool import WorkerDiedError
from esper.report import draw_charts
from esper.tasks.task import TaskDataError

_OF_ANY_START = frozenset({"out", "processes", "quiet", "as_json", "dry_run"})
"""Options that a comparison begun before still takes; its settings are kept in its folder."""


def compare(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(help="What to train, as for esper grow; a folder begun before knows."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Who grows; the first is judged, more are arms beside it. Repeatable."),
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
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, as for esper grow."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; one begun before goes on where it was.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default one per CPU.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the folder only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and stop.")
    ] = False,
) -> None:
    """Train TASK's network grown and at every size from the start: does growth pay?"""
    if quiet and as_json:
        raise typer.BadParameter("--quiet and --json exclude each other")
    if task is None and out is not None:
        _refuse_settings(context, out)
        settings = _kept(out)
    else:
        options: dict[str, Any] = {"policy": policy[0] if policy else None, "device": device}
        if epochs is not None:
            options["trainer"] = {"epochs": epochs}
        run = _run_config(only_task(task, None), config, set_ or [], options)
        settings = _settings(
            run,
            policies=tuple(policy[1:]) if policy else (),
            random_seeds=tuple(range(first_seed, first_seed + seeds)),
            search_rates=rates,
            search_seeds=search_seeds,
            equal_flops=equal_flops,
            intermediate_sizes=sizes,
            random_times=random_times,
        )
    console = Console()
    if dry_run:
        console.out(settings.model_dump_json(indent=2), highlight=False)
        return
    path = out or Path("runs") / f"compare-{folder_name(settings.run.task, datetime.now(UTC))}"
    try:
        usable_device(settings.run.device)
        if not holds_comparison(path):
            check_runs(settings)
        folder = ComparisonFolder(path, settings)
        view = _view(console, settings, quiet=quiet, as_json=as_json)
        comparison = _run(settings, folder, view, processes or os.cpu_count() or 1)
    except (ComparisonFolderError, SettingsError, TaskDataError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except WorkerDiedError as error:
        typer.echo(f"{error}\n{_go_on(path)}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        if not (quiet or as_json):
            print_comparison(console, Comparison(settings, folder.results()))
        typer.echo(f"stopped; go on with: {_go_on(path)}", err=True)
        raise typer.Exit(130) from None
    _conclude(console, folder, comparison, quiet=quiet, as_json=as_json)


def _refuse_settings(context: typer.Context, folder: Path) -> None:
    """Raise if a setting is given for a comparison that has its own."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [
        name
        for name, source in sources.items()
        if name not in _OF_ANY_START and source is not None and source.name != "DEFAULT"
    ]
    if given:
        names = ", ".join(f"--{name.rstrip('_').replace('_', '-')}" for name in given)
        raise typer.BadParameter(
            f"{folder} goes on with its own settings, and {names} would change them; leave that "
            "out, or name a task and another folder"
        )


def _kept(folder: Path) -> CompareConfig:
    try:
        return ComparisonFolder.config_of(folder)
    except ComparisonFolderError as error:
        raise typer.BadParameter(f"{error}; name a task to begin one there") from error


def _run_config(
    task: str, file: Path | None, settings: list[str], options: dict[str, Any]
) -> RunConfig:
    try:
        return load_run_config(task, file, settings, options)
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error


def _settings(run: RunConfig, **chosen: Any) -> CompareConfig:
    for name in (run.policy, *chosen["policies"]):
        try:
            chosen_policy(run.model_copy(update={"policy": name}))
        except SettingsError as error:
            raise typer.BadParameter(str(error)) from error
    try:
        return CompareConfig(run=run, **chosen)
    except ValidationError as error:
        raise typer.BadParameter("; ".join(issue["msg"] for issue in error.errors())) from error


def _view(console: Console, settings: CompareConfig, *, quiet: bool, as_json: bool) -> CompareView:
    if quiet:
        return QuietCompareView()
    if as_json:
        return JsonCompareView(console)
    if console.is_terminal:
        return LiveCompareView(console, settings)
    return LinesCompareView(console)


def _run(
    settings: CompareConfig, folder: ComparisonFolder, view: CompareView, processes: int
) -> Comparison:
    with view:
        return run_missing(settings, folder, processes=processes, on_change=view.change)


def _conclude(
    console: Console,
    folder: ComparisonFolder,
    comparison: Comparison,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    record = summary_record(comparison)
    folder.summarise(record)
    drawn = f"picture     {folder.picture}"
    try:
        draw_charts(comparison_title(comparison), comparison_charts(comparison), folder.picture)
    except (ModuleNotFoundError, ValueError) as error:
        drawn = f"no picture: {error}"
    told = leave_report(folder.path)
    if quiet:
        console.out(str(folder.path), highlight=False)
        return
    if as_json:
        console.print_json(
            data={"kind": "summary", "folder": str(folder.path), **record}, indent=None
        )
        return
    print_comparison(console, comparison)
    console.print()
    console.print(drawn, highlight=False, soft_wrap=True)
    console.print(told, highlight=False, soft_wrap=True)
    console.print(f"folder      {folder.path}", highlight=False, soft_wrap=True)


def _go_on(folder: Path) -> str:
    return f"{program()} compare --out {shlex.quote(str(folder))}"
