"""The `esper` command."""

import io
import sys
from typing import Annotated

import typer

from esper import __version__
from esper.cli.bench import bench
from esper.cli.blueprints import blueprints
from esper.cli.compare import compare
from esper.cli.compile import compile_
from esper.cli.dashboard import dashboard
from esper.cli.doctor import doctor
from esper.cli.grow import grow
from esper.cli.inspecting import inspect
from esper.cli.policy import policy
from esper.cli.report import report
from esper.cli.resume import resume
from esper.cli.send import send
from esper.cli.serve import serve
from esper.cli.status import status

app = typer.Typer(
    name="esper",
    help="Grow neural networks while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"esper {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and stop.",
        ),
    ] = False,
) -> None:
    """Grow neural networks while they train."""


app.command()(grow)
app.command()(resume)
app.command()(compare)
app.command()(inspect)
app.command()(report)
app.add_typer(policy)
app.command()(send)
app.command()(serve)
app.command()(status)
app.command()(dashboard)
app.command()(bench)
app.command()(blueprints)
app.command("compile")(compile_)
app.command()(doctor)


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        # A letter that the terminal's encoding has not is no reason to end.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
