"""`esper report`: a run or a comparison as a page to look at, and as pictures."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from esper.experiments.comparison import (
    Comparison,
    ComparisonFolderError,
    comparison_report,
    draw_comparison,
    holds_comparison,
    judge,
    read_comparison,
    references_of,
    summarise,
)
from esper.lifecycle.events import EventSchemaError
from esper.report import Reference, draw_run, run_report, tell
from esper.telemetry.run_store import RunFolderError, RunReader

REPORT_FILE = "report.html"

_CANNOT_SHOW = (
    RunFolderError,
    ComparisonFolderError,
    EventSchemaError,
    ModuleNotFoundError,
    OSError,
)


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run or a comparison, as grow and compare print it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help=f"File to write; default {REPORT_FILE} in the folder.")
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(help="Folder of a comparison whose networks the run is shown beside."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the pictures as a PNG.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write what grew in RUN, what it gave and cost, and why: one HTML file that needs no network.

    Also of a run that is still going on, and of a comparison.
    """
    console = Console()
    try:
        if holds_comparison(run):
            if beside is not None:
                raise typer.BadParameter(f"{run} is a comparison itself; leave --beside out")
            comparison = read_comparison(run)
            content = comparison_report(comparison, name=run.resolve().name)
            if png is not None:
                _draw_comparison(comparison, run, png)
        else:
            reader = RunReader(run)
            content = run_report(reader, references=_references(reader, beside))
            if png is not None:
                draw_run(reader, tell(reader.events()), png)
        target = out or run / REPORT_FILE
        target.write_text(content, encoding="utf-8")
    except _CANNOT_SHOW as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"report   {target}", highlight=False, soft_wrap=True)
    if png is not None:
        console.print(f"picture  {png}", highlight=False, soft_wrap=True)
    if open_ and not webbrowser.open(target.resolve().as_uri()):
        console.print("no browser was found here; copy the file to where there is one")


def leave_report(folder: Path) -> str:
    """Write the report into the folder of a run or a comparison, and tell where, or why not."""
    target = folder / REPORT_FILE
    try:
        if holds_comparison(folder):
            content = comparison_report(read_comparison(folder), name=folder.resolve().name)
        else:
            content = run_report(RunReader(folder))
        target.write_text(content, encoding="utf-8")
    except _CANNOT_SHOW as error:
        return f"no report: {error}"
    return f"report      {target}"


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


def _draw_comparison(comparison: Comparison, folder: Path, target: Path) -> None:
    task = comparison.config.run.task
    try:
        draw_comparison(task, summarise(comparison), judge(comparison), target)
    except ValueError as error:
        raise ComparisonFolderError(f"{folder}: {error}") from error
