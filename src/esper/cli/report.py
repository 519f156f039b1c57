"""`esper report`: a run, a comparison or a training as a page to look at, and as pictures."""

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from esper.cli.printing import plain_console
from esper.experiments.comparison import (
    comparison_charts,
    comparison_report,
    comparison_title,
    holds_comparison,
    read_comparison,
    references_of,
)
from esper.experiments.series_folder import SeriesFolderError
from esper.lifecycle.events import EventSchemaError
from esper.report import (
    Chart,
    Reference,
    draw_charts,
    run_charts,
    run_report,
    tell_run,
    tell_training,
    training_charts,
    training_report,
)
from esper.report.chart import growth_words
from esper.report.png import NothingToDrawError
from esper.report.training_page import training_title
from esper.telemetry.run_folder import RunFolderError, replace_file
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_reader import RunReader

REPORT_FILE = "report.html"

_CANNOT_SHOW = (
    RunFolderError,
    SeriesFolderError,
    EventSchemaError,
    ModuleNotFoundError,
    NothingToDrawError,
    OSError,
)


def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder as grow, compare or policy train print it."),
    ],
    out: Annotated[
        Path | None, typer.Option(help=f"File to write; default {REPORT_FILE} in the folder.")
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(help="Folder of a comparison whose networks the run is shown beside."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the pictures as a PNG.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A picture that the PNG shows, as loss or lanes; default all of them."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write what grew in RUN, what it gave and cost, and why: one HTML file that needs no network.

    Also of a run that is still going on, of a comparison, and of the training of a policy.
    """
    if only and png is None:
        raise typer.BadParameter("--only chooses what the PNG shows; name one with --png")
    console = plain_console()
    if png is not None and not png.suffix:
        png = Path(f"{png}.png")
    try:
        content = _page(run, beside)
        if png is not None:
            title, charts = _pictures(run, beside)
            _draw(title, _chosen(charts, only), png)
        target = out or run / REPORT_FILE
        _write(target, content)
    except _CANNOT_SHOW as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"report   {target}", soft_wrap=True)
    if png is not None:
        console.print(f"picture  {png}", soft_wrap=True)
    if open_ and not webbrowser.open(target.resolve().as_uri()):
        console.print("no browser was found here; copy the file to where there is one")


def _draw(title: str, charts: Sequence[Chart], target: Path) -> None:
    try:
        draw_charts(title, charts, target)
    except NothingToDrawError:
        raise
    except ValueError as error:  # matplotlib's: no picture's file is called so
        raise typer.BadParameter(f"--png {target}: {error}") from error


def _chosen(charts: Sequence[Chart], only: Sequence[str] | None) -> Sequence[Chart]:
    known = [chart.key for chart in charts]
    for name in only or ():
        if name not in known:
            raise typer.BadParameter(f"no picture {name!r} here; pictures: {', '.join(known)}")
    return [chart for chart in charts if not only or chart.key in only]


def leave_report(folder: Path) -> str:
    """Write the report into a folder of whatever kind, and tell where, or why not."""
    target = folder / REPORT_FILE
    try:
        _write(target, _page(folder))
    except _CANNOT_SHOW as error:
        return f"no report: {error}"
    return f"report      {target}"


def _write(target: Path, page: str) -> None:
    """Write a page, with a ? for each byte of a folder's name that is no text."""
    replace_file(target, page.encode("utf-8", "replace"))


def _page(folder: Path, beside: Path | None = None) -> str:
    if holds_comparison(folder):
        _refuse(beside, f"{folder} is a comparison itself")
        return comparison_report(read_comparison(folder), name=folder.resolve().name)
    reader = RunReader(folder)
    if training_settings(reader.config()) is not None:
        _refuse(beside, f"{folder} is the training of a policy, which no network stands beside")
        return training_report(reader)
    return run_report(reader, references=_references(reader, beside))


def _pictures(folder: Path, beside: Path | None) -> tuple[str, list[Chart]]:
    """Return the charts of a page, and their title."""
    if holds_comparison(folder):
        comparison = read_comparison(folder)
        return comparison_title(comparison), comparison_charts(comparison)
    reader = RunReader(folder)
    task = str(reader.config().get("task", "run"))
    if training_settings(reader.config()) is not None:
        training = tell_training(reader)
        return training_title(task, training), training_charts(training)
    story = tell_run(reader)
    charts = run_charts(story, reader.metrics(), references=_references(reader, beside))
    return f"{task} · {growth_words(story)}", charts


def _refuse(beside: Path | None, reason: str) -> None:
    if beside is not None:
        raise typer.BadParameter(f"{reason}; leave --beside out")


def _references(reader: RunReader, folder: Path | None) -> list[Reference]:
    if folder is None:
        return []
    comparison = read_comparison(folder)
    task, other = reader.config().get("task"), comparison.config.run.task
    if task != other:
        raise typer.BadParameter(
            f"{reader.folder} is of the task {task}, and {folder} compares networks of {other}; "
            "their losses cannot be shown side by side"
        )
    return references_of(comparison)
