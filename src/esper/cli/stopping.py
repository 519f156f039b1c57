"""What a run says that ends before its end: on Ctrl-C, by a command, on SIGTERM, diverged."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from esper.cli.command_line import command_line
from esper.cli.printing import lasting_console, print_json_line
from esper.telemetry.run_folder import CHECKPOINTS_FOLDER, RunFolderError
from esper.telemetry.run_reader import RunReader
from esper.training.control import RunStoppedError
from esper.training.safeguard import TrainingDivergedError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
"""As a shell has it of a program that the signal has ended."""
EXIT_DIVERGED = 1


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come where no step is waited for, and does what Ctrl-C does."""


@contextmanager
def ended_at_once_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what surrounds it is closed.

    Only in the main thread, which alone may take signals.

    Raises:
        TerminatedError: It has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stops_told(folder: Path, *, quiet: bool, as_json: bool) -> Iterator[None]:
    """End the program where the run in a folder is stopped or diverges, and tell the way on.

    Raises:
        typer.Exit: The run was stopped, or has diverged; code 0 if a command has told it to stop.
    """
    try:
        yield
    except RunStoppedError as stopped:
        _tell_stopped(stopped, folder, quiet=quiet, as_json=as_json)
        raise typer.Exit(0 if stopped.commanded else EXIT_TERMINATED) from stopped
    except TrainingDivergedError as error:
        _tell_diverged(error, folder, quiet=quiet, as_json=as_json)
        raise typer.Exit(EXIT_DIVERGED) from error
    except KeyboardInterrupt as error:
        tell_interrupted(_way_on(folder))
        terminated = isinstance(error, TerminatedError)
        raise typer.Exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED) from None


def tell_interrupted(way_on: str) -> None:
    """Tell that a signal has ended the program, and how to go on; never among what is printed."""
    typer.echo(f"stopped; {way_on}", err=True)


def _tell_diverged(
    error: TrainingDivergedError, folder: Path, *, quiet: bool, as_json: bool
) -> None:
    """Tell why, and where to look: going on would come to the same."""
    console = lasting_console()
    if as_json:
        diverged = {"kind": "diverged", "reason": str(error), "folder": str(folder)}
        print_json_line(console, diverged)
    elif quiet:
        console.out(str(folder), highlight=False)
    typer.echo(f"{error}; {_way_back(folder)}", err=True)


def _tell_stopped(stopped: RunStoppedError, folder: Path, *, quiet: bool, as_json: bool) -> None:
    console = lasting_console()
    if as_json:
        told = {"kind": "stopped", "by": stopped.by, "step": stopped.step, "folder": str(folder)}
        print_json_line(console, {**told, "saved": stopped.saved})
    elif quiet:
        console.out(str(folder), highlight=False)
    else:
        how = "go on with" if stopped.saved else "no checkpoint could be written; begin anew with"
        told_so = f"{stopped}; {how}: {command_line('resume', folder)}"
        console.print(told_so, soft_wrap=True)


def _way_on(folder: Path) -> str:
    """Return what can be done with a run that was interrupted."""
    try:
        finished = RunReader(folder).status == "finished"
    except RunFolderError:
        return "the run had not begun"
    if finished:
        return _way_back(folder)
    resume = command_line("resume", folder)
    if any((folder / CHECKPOINTS_FOLDER).glob("step-*")):
        return f"go on from the newest checkpoint with: {resume}"
    return f"there is no checkpoint yet; begin anew with: {resume}"


def _way_back(folder: Path) -> str:
    """Return how to look at a run that does not go on."""
    finished = RunReader(folder).status == "finished"
    what = "the run itself has come to its end" if finished else "what came before"
    return f"{what}: {command_line('inspect', folder)}"
