"""Esper's own services as programs that a supervisor runs: the router, the dashboard, job checks.

`python -m esper.supervision.children router|dashboard|check …`. Both services beat only when they
have done something for somebody: the router when its own loop has come round, the dashboard when it
has answered a request that this program makes.
"""

import argparse
import gc
import http.client
import json
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from esper.bus.bus import EMERGENCY, TELEMETRY
from esper.bus.command_sender import this_user
from esper.bus.router import Router
from esper.experiments.bus_connection import open_run_bus
from esper.experiments.config import load_run_config
from esper.experiments.settings import SettingsError
from esper.lifecycle.commands import MAX_NAME_CHARACTERS
from esper.signing import Keyring
from esper.supervision.beating_bus import BeatingBus
from esper.supervision.config import DASHBOARD, ROUTER
from esper.telemetry.heartbeat import Heartbeat

if TYPE_CHECKING:
    from esper.dashboard import CommandChannel

CHECK = "check"

_PROBE_SECONDS = 1.0
_PROBE_LIMIT_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(prog="esper.supervision.children")
    kinds = parser.add_subparsers(dest="kind", required=True)
    router = kinds.add_parser(ROUTER)
    router.add_argument("--bus", required=True)
    router.add_argument("--folder", type=Path, required=True)
    router.add_argument("--key-file", type=Path)
    dashboard = kinds.add_parser(DASHBOARD)
    dashboard.add_argument("--folder", type=Path, required=True)
    dashboard.add_argument("--host", required=True)
    dashboard.add_argument("--port", type=int, required=True)
    dashboard.add_argument("--token-file", type=Path)
    dashboard.add_argument("--bus")
    dashboard.add_argument("--key-file", type=Path)
    check = kinds.add_parser(CHECK)
    check.add_argument("task")
    check.add_argument("--config", type=Path)
    check.add_argument("--set", action="append", default=[])
    given = parser.parse_args(arguments)
    if given.kind == ROUTER:
        route(given.bus, given.folder, given.key_file)
    elif given.kind == DASHBOARD:
        channel = None if given.bus is None else _channel(given.folder, given.bus, given.key_file)
        show(given.folder, given.host, given.port, given.token_file, channel)
    else:
        sys.stdout.write(json.dumps(looked_at(given.task, given.config, given.set)))


def looked_at(task: str, file: Path | None, settings: Sequence[str]) -> dict[str, str | None]:
    """Return a job's device, and its problem as far as can be said without training it."""
    try:
        config = load_run_config(task, file, settings, {})
    except SettingsError as error:
        return {"device": None, "problem": str(error)}
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:  # torch's own, of a build without CUDA too
        told = str(error).partition("\n")[0]
        problem = f"device {config.device} cannot be used: {told}"
        return {"device": config.device, "problem": problem}
    return {"device": config.device, "problem": None}


def show(
    folder: Path,
    host: str,
    port: int,
    token_file: Path | None,
    channel: "CommandChannel | None" = None,
) -> None:
    """Serve the dashboard until SIGTERM.

    Args:
        folder: That the runs are in.
        host: Address to serve on.
        port: To serve on.
        token_file: Holds the token that the page asks for; None asks for none on this machine.
        channel: Takes commands to runs; None lets people only look.

    Raises:
        ModuleNotFoundError: The extra is not installed.
        AddressError: The address cannot be served.
    """
    from esper.dashboard import (  # noqa: PLC0415 – an optional extra
        DashboardServer,
        allow_many_files,
        find_token,
    )

    heartbeat = Heartbeat.from_environment()
    server = DashboardServer(
        folder, host=host, port=port, token=find_token(token_file), channel=channel
    )
    allow_many_files()
    address = server.address
    sys.stdout.write(f"{address.url_with_token if address.generated else address.url}\n")
    sys.stdout.flush()
    over = threading.Event()
    probe = threading.Thread(
        target=_beat_when_answered, args=(heartbeat, _near(host), port, over), daemon=True
    )
    probe.start()
    try:
        server.serve()
    except KeyboardInterrupt:
        pass
    finally:
        over.set()


def _channel(folder: Path, address: str, key_file: Path | None) -> "CommandChannel":
    from esper.dashboard.bus_channel import BusCommandChannel  # noqa: PLC0415 – an optional extra

    sender = f"{this_user()}, by the dashboard"[-MAX_NAME_CHARACTERS:]
    return BusCommandChannel(folder, open_run_bus(address), _keyring(key_file), sender=sender)


def _near(host: str) -> str:
    """Return an address of this machine at which a server of all addresses answers."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 – it is looked up


def _beat_when_answered(heartbeat: Heartbeat, host: str, port: int, over: threading.Event) -> None:
    """Ask a server for something small each second, and beat when it has answered."""
    while not over.is_set():
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_LIMIT_SECONDS)
        with suppress(OSError, http.client.HTTPException):  # no answer, so no beat
            connection.request("GET", "/", headers={"Host": f"localhost:{port}"})
            connection.getresponse().read()
            heartbeat.beat("serving")
        connection.close()
        over.wait(_PROBE_SECONDS)


def route(address: str, folder: Path, key_file: Path | None) -> None:
    """Route what runs tell until SIGTERM.

    Raises:
        KeyFileError: The keys cannot be read.
        ModuleNotFoundError: The extra is not installed.
        ValueError: The address is none.
        BusRefusedError: The server will not have it.

    Effects: garbage collection leaves out what there is already. Going through all that was
        imported stopped the process for 110 to 160 ms, several times a second in a flood, and an
        emergency waited that long.
    """
    heartbeat = Heartbeat.from_environment()
    keyring = _keyring(key_file)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    bus = open_run_bus(address)
    gc.freeze()  # now that the client of the bus is imported too

    def beat(state: str) -> None:
        heartbeat.beat(state, **router.facts().model_dump())

    router = Router(BeatingBus(bus, (EMERGENCY, TELEMETRY), beat), keyring, folder)
    router.run(stop)
    bus.close()


def _keyring(file: Path | None) -> Keyring:
    return Keyring.of_user() if file is None else Keyring.from_file(file)


if __name__ == "__main__":
    main()
