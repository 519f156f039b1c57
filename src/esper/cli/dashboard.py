"""`esper dashboard`: follow and compare runs in a browser."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esper.bus.addresses import check_no_password
from esper.bus.command_sender import this_user
from esper.cli.printing import plain_console
from esper.experiments.bus_connection import open_run_bus
from esper.signing import Keyring

if TYPE_CHECKING:
    from esper.dashboard import CommandChannel

DEFAULT_PORT = 8265

_EXTRA = "the dashboard needs {}: pip install 'esper-lite[dashboard]'"
_PACKAGES = ("plotly", "starlette", "uvicorn")


def dashboard(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Where the runs are: in it, or one folder deeper."),
    ] = Path("runs"),
    host: Annotated[
        str,
        typer.Option(help="Address to serve on; beyond this machine a token is needed to look."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = (
        DEFAULT_PORT
    ),
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the token, yours alone; or set ESPER_DASHBOARD_TOKEN. With "
            "neither, one is made if it is needed, and printed in the address."
        ),
    ] = None,
    bus: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Address of the bus that runs listen to: whoever may open the page may then "
            "pause, stop, advance, commit and prune.",
        ),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Keys that runs take commands by; default your own.")
    ] = None,
) -> None:
    """Show the runs in FOLDER on a local web page, as they go on, until Ctrl-C."""
    try:
        from esper.dashboard import (  # noqa: PLC0415 – an optional extra
            AddressError,
            DashboardServer,
            TokenError,
            allow_many_files,
            find_token,
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise typer.BadParameter(_EXTRA.format(package)) from error
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder")
    try:
        channel = None if bus is None else _channel(folder, bus, key_file)
        server = DashboardServer(
            folder, host=host, port=port, token=find_token(token_file), channel=channel
        )
    except (AddressError, TokenError, OSError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    allow_many_files()
    address = server.address
    console = plain_console()
    yet = "" if folder.exists() else ": there is no such folder yet"
    console.print(f"runs in {folder.absolute()}{yet}", soft_wrap=True)
    url = address.url_with_token if address.generated else address.url
    console.print(url, style="bold", soft_wrap=True)
    if address.generated:
        console.print(
            "whoever has this address sees the runs; it is sent in the clear, which only a network "
            "you trust, a tunnel (ssh -L) or a proxy with TLS makes safe"
        )
    elif address.token is not None:
        console.print("the page asks for the token")
    try:
        server.serve()
    except KeyboardInterrupt:
        console.print("ended")


def _channel(folder: Path, bus: str, key_file: Path | None) -> "CommandChannel":
    """Return what passes commands on.

    Raises:
        ModuleNotFoundError: Redis' client is not installed.
        ValueError: The address is none, or holds a password; or the keys cannot be read.
    """
    from esper.dashboard.bus_channel import BusCommandChannel  # noqa: PLC0415 – an optional extra

    check_no_password("--bus", bus)
    keyring = Keyring.of_user() if key_file is None else Keyring.from_file(key_file)
    sender = f"{this_user()}, by the dashboard"
    return BusCommandChannel(folder, open_run_bus(bus), keyring, sender=sender)
