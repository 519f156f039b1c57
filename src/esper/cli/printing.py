"""What is printed is shown as it is: text without markup, JSON that every parser takes."""

import json
import os
import sys
from typing import Any, TextIO, cast

import typer
from rich.console import Console

from esper.report.chart import json_values


class _LastingOutput:
    """Standard output that takes everything: what cannot be written any more goes nowhere.

    The first time it is told on standard error.
    """

    def __init__(self, output: TextIO, errors: TextIO | None) -> None:
        self._output, self._errors = output, errors

    def write(self, text: str) -> int:
        """Write, or pass by."""
        try:
            return self._output.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or pass by."""
        try:
            self._output.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _lead_nowhere(self._output)
        told = f"what is printed cannot be written any more: {error}; all goes on"
        try:
            typer.echo(told, file=self._errors)
        except OSError:
            assert self._errors is not None
            _lead_nowhere(self._errors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def _lead_nowhere(stream: TextIO) -> None:
    """Let what is written from now on go nowhere, and what Python has still to write at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def plain_console() -> Console:
    """Return a console to which no path, name or error is markup, an emoji or a value to colour."""
    return Console(markup=False, emoji=False, highlight=False)


def lasting_console() -> Console:
    """Return a plain console for what trains, which goes on where its output cannot be written."""
    if sys.stdout is None:  # it was closed from the start
        return plain_console()
    output = cast("TextIO", _LastingOutput(sys.stdout, sys.stderr))
    return Console(file=output, markup=False, emoji=False, highlight=False)


def print_json_line(console: Console, document: Any) -> None:
    """Print a JSON value in a line of its own; a number that is not finite is null in it."""
    console.out(json.dumps(json_values(document), allow_nan=False), highlight=False)
