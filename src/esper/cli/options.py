"""Options that several commands take, and what they ask for."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console

from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.settings import SettingsError
from esper.own_code import own_module

_MAX_TASK_CHARACTERS = 80

ConfigFile = Annotated[Path | None, typer.Option(help="TOML file of settings.")]
Report = Annotated[
    bool, typer.Option(help=r"Write a report into the folder (needs esper-lite\[report]).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import", metavar="MODULE", help="Registers blueprints of yours; several times for more."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings and stop.")]


def refuse_both(*, quiet: bool, as_json: bool) -> None:
    """Raise if a command is asked for less words and for none at once."""
    if quiet and as_json:
        raise typer.BadParameter("--quiet and --json exclude each other")


def refuse_neither() -> NoReturn:
    """Raise as neither a task is named nor a folder to go on in."""
    raise typer.BadParameter("name a task, or a folder to go on in: --out FOLDER")


def refuse_changes(whose: str, options: Collection[str]) -> None:
    """Raise if options would change the settings of what was begun before.

    Args:
        whose: What goes on: a folder, or a word for it.
        options: Names of the parameters that were given.
    """
    if options:
        names = ", ".join(f"--{name.rstrip('_').replace('_', '-')}" for name in options)
        raise typer.BadParameter(
            f"{whose} goes on with its own settings, and {names} would change them; leave that "
            "out, or name a task and another folder"
        )


@contextmanager
def bad_parameter(*errors: type[Exception]) -> Iterator[None]:
    """Let errors of these kinds be those of whoever called the program."""
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error)) from error


def import_modules(names: Sequence[str] | None) -> None:
    """Import what `Imports` asks for, from the working directory if it is there."""
    for name in names or ():
        try:
            own_module(name)
        except ValueError as error:
            raise typer.BadParameter(f"--import: {error}") from error


def settings_asked(*, epochs: int | None = None, **given: Any) -> dict[str, Any]:
    """Return the settings that options ask for, without those that were left out."""
    asked = {name: value for name, value in given.items() if value is not None}
    return asked if epochs is None else {**asked, "trainer": {"epochs": epochs}}


def run_settings(
    task: str, file: Path | None, settings: Sequence[str] | None, asked: dict[str, Any]
) -> RunConfig:
    """Return the settings of a run: the task's own, a file's, `--set`'s and options', last wins."""
    with bad_parameter(SettingsError):
        return load_run_config(task, file, settings or (), asked)


def print_settings(console: Console, settings: BaseModel, *, as_json: bool) -> None:
    """Print settings for a dry run, so that a program can read them; in one line if asked to."""
    console.out(settings.model_dump_json(indent=None if as_json else 2), highlight=False)


def new_folder(out: Path | None, task: str, *, kind: str = "") -> Path:
    """Return where a command writes: as asked, else a folder in runs that no other is called as.

    Args:
        out: As asked for.
        task: Names the folder otherwise.
        kind: Of what is in it, before the task; nothing for a run.

    Raises:
        typer.BadParameter: No folder can be made there.
    """
    folder = out or Path("runs") / f"{kind}{_folder_name(task, datetime.now(UTC))}"
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise typer.BadParameter(f"{folder} can be no folder: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise typer.BadParameter(
                f"{folder} cannot be written: {there} is not yours to write in"
            )
        _try_to_make(folder)
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be made: {error.strerror}") from error
    return folder


def _try_to_make(folder: Path) -> None:
    """Make a folder, and those above it, and take away again what was not there.

    Raises:
        OSError: The system makes no such folder.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        for place in missing:
            with suppress(OSError):  # it was not made, or another program has put something there
                place.rmdir()


def _folder_name(task: str, time: datetime) -> str:
    """Return a name for the run that every file system takes: a folder of data has its last part.

    Of a long name the end is kept.
    """
    scheme, _, name = task.partition(":") if ":" in task else ("", "", task)
    if scheme == "folder":
        name = Path(name).name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-_MAX_TASK_CHARACTERS:].strip("-.")
    prefix = f"{scheme}-" if scheme else ""
    return f"{prefix}{plain}-{time:%Y%m%d-%H%M%S-%f}"
