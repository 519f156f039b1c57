"""`esper status`: how everything that is served stands."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.bus.addresses import check_no_password
from esper.bus.bus import BusRefusedError, BusUnavailableError
from esper.cli.command_line import command_line
from esper.experiments.bus_connection import open_run_bus
from esper.signing import KeyFileError, Keyring
from esper.supervision.config import ServeConfigError, load_serve_config
from esper.supervision.folder_lock import is_served
from esper.supervision.health_reader import Health, HealthOnBus, read_health
from esper.supervision.status import (
    BeatStatus,
    ServeStatus,
    ServiceState,
    ServiceStatus,
    StatusError,
    needs_a_person,
    read_status,
)
from esper.telemetry.run_folder import DATABASE_FILE

_UNWELL = 1
_NOBODY = 3
_OLD_SECONDS = 10.0
"""A status that is written every second."""
_WIDE_COLUMNS = 100
_STYLES: dict[str, str] = {
    ServiceState.READY: "green",
    ServiceState.FINISHED: "green",
    ServiceState.GIVEN_UP: "red",
    ServiceState.BACKING_OFF: "yellow",
}


def status(
    where: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER|CONFIG",
            help="Folder of esper serve, or its config file; default serve.",
        ),
    ] = None,
    bus: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask this bus instead: of everything that tells it."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Verifies what is on the bus; default your own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what runs, since when, and why not.

    Ends with 0 if all is well, 1 if something is given up or silent, 3 if nobody serves or the
    bus cannot be reached.
    """
    if bus is not None and where is not None:
        raise typer.BadParameter(f"--bus and {where} exclude each other")
    if bus is None and key_file is not None:
        raise typer.BadParameter("--key-file verifies what is on a bus; add --bus URL")
    console = Console(markup=False, emoji=False)  # what programs and files say is shown as it is
    if bus is not None:
        code = _from_bus(console, bus, key_file, as_json=as_json)
    else:
        code = _from_folder(console, _folder(where or Path("serve")), as_json=as_json)
    raise typer.Exit(code)


def _folder(where: Path) -> Path:
    if not where.is_file():
        return where
    try:
        return load_serve_config(where).folder
    except ServeConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _from_folder(console: Console, folder: Path, *, as_json: bool) -> int:
    """Print what a supervisor has written, and return the exit code."""
    try:
        found = read_status(folder)
    except StatusError as error:
        problem = _of_a_run(folder) or str(error)
        _print_problem(console, {"served": False}, problem, as_json=as_json)
        return _NOBODY
    served = is_served(folder)
    age = time.time() - found.time_seconds
    silent = served and age > _OLD_SECONDS
    if as_json:
        told = {"served": served, "age_seconds": age, **found.model_dump(mode="json")}
        console.out(json.dumps(told), highlight=False)
    else:
        _print_head(console, found, age, served=served, silent=silent)
        now = time.time() if served else found.time_seconds
        console.print(_table(found.services, now, wide=console.width >= _WIDE_COLUMNS))
        _print_lines(console, found)
    if not served:
        return _NOBODY
    unwell = any(needs_a_person(one, now_seconds=found.time_seconds) for one in found.services)
    return _UNWELL if silent or unwell else 0


def _of_a_run(folder: Path) -> str | None:
    """Return where to look instead, if a folder without a status is a run's."""
    if not (folder / DATABASE_FILE).is_file():
        return None
    inspect = command_line("inspect", folder)
    return f"{folder} is the folder of a run, not of esper serve; look at it with: {inspect}"


def _print_head(
    console: Console, found: ServeStatus, age: float, *, served: bool, silent: bool
) -> None:
    if not served:
        line = Text(
            f"nobody serves: process {found.pid} ended {_ago(age)} ago, when it was so", "red"
        )
    elif silent:
        line = Text(f"process {found.pid} serves, and was silent for {_ago(age)}", "red")
    else:
        line = Text(f"process {found.pid} serves{', and ends' if found.ending else ''}")
    console.print(line)
    console.print(f"{found.config} on {found.host}", highlight=False, soft_wrap=True)
    if served and found.bus not in (None, "told"):
        console.print(f"bus: {found.bus}", style="yellow", highlight=False)
    for finding in found.preflight:
        if finding.level == "warning":
            console.print(f"{finding.about}: {finding.text}", style="yellow", highlight=False)
    if found.reload is not None and not found.reload.done:
        console.print(f"file not taken: {found.reload.text}", style="red", highlight=False)
    console.print()


def _table(services: Sequence[ServiceStatus], now: float, *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("name", no_wrap=True, overflow="ellipsis", max_width=20)
    if wide:
        table.add_column("kind", no_wrap=True)
        table.add_column("pid", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("restarts", justify="right", no_wrap=True)
    table.add_column("sign of life", overflow="fold")
    table.add_column("why", overflow="fold", ratio=1)
    for service in services:
        cells: list[str | Text] = [service.name]
        if wide:
            cells += [service.kind, "" if service.pid is None else str(service.pid)]
        cells += [
            Text(service.state, _STYLES.get(service.state, "")),
            _ago(now - service.since_seconds),
            str(service.restarts or ""),
            _told(service.beat),
            _why(service, now),
        ]
        table.add_row(*cells)
    return table


def _told(beat: BeatStatus | None) -> str:
    if beat is None:
        return ""
    step = "" if beat.step is None else f" at step {beat.step:,}"
    return f"{beat.state}{step}, {_ago(beat.age_seconds)} ago"


def _why(service: ServiceStatus, now: float) -> str:
    reason = service.reason or ""
    if service.next_start_seconds is not None:
        left = service.next_start_seconds - now
        return f"{reason}; starts again in {_ago(max(0.0, left))}"
    if not reason and service.restarts and service.last_exit:
        return f"before: {service.last_exit}"
    return reason


def _print_lines(console: Console, found: ServeStatus) -> None:
    """Print the last words of what is given up."""
    for service in found.services:
        if service.state == ServiceState.GIVEN_UP:
            console.print()
            console.print(
                f"{service.name}, last lines of {service.log}", highlight=False, soft_wrap=True
            )
            for line in service.last_lines or ("(it has printed nothing)",):
                console.print(Text(f"  {line}", "dim"), soft_wrap=True)


def _print_problem(
    console: Console, standing: dict[str, Any], problem: str, *, as_json: bool
) -> None:
    """Print why nothing is known of anything."""
    if as_json:
        console.out(json.dumps({**standing, "problem": problem}), highlight=False)
    else:
        console.print(problem, highlight=False, soft_wrap=True)


def _from_bus(console: Console, address: str, key_file: Path | None, *, as_json: bool) -> int:
    """Print what was told over a bus, and return the exit code."""
    try:
        check_no_password("it", address)
        keyring = Keyring.of_user() if key_file is None else Keyring.from_file(key_file)
        with closing(open_run_bus(address)) as bus:
            found = read_health(bus, keyring, now_seconds=time.time())
    except BusUnavailableError as error:
        _print_problem(console, {"services": []}, str(error), as_json=as_json)
        return _NOBODY
    except (BusRefusedError, KeyFileError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except ValueError as error:
        raise typer.BadParameter(f"--bus: {error}") from error
    if as_json:
        told = {"services": [asdict(one) for one in found.services], "refused": found.refused}
        console.out(json.dumps(told), highlight=False)
    else:
        _print_health(console, found)
    if all(health.is_old for health in found.services):
        return _NOBODY
    return _UNWELL if any(health.needs_a_person for health in found.services) else 0


def _print_health(console: Console, found: HealthOnBus) -> None:
    if not found.services:
        console.print("nobody has told this bus anything that a key here has signed")
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("name", "state"):
            table.add_column(name, no_wrap=True)
        table.add_column("told", justify="right", no_wrap=True)
        table.add_column("by", overflow="fold")
        table.add_column("host", overflow="fold")
        table.add_column("why", overflow="fold", ratio=1)
        for health in found.services:
            table.add_row(*_health_cells(health))
        console.print(table)
    if found.refused:
        console.print(
            f"not taken: {found.refused} messages that no key here has signed, or that are none",
            style="yellow",
            highlight=False,
        )


def _health_cells(health: Health) -> list[str | Text]:
    state = Text(health.state, _STYLES.get(health.state, ""))
    if health.is_silent:
        state = Text(f"silent, was {health.state}", "red")
    reason = health.details.get("reason")
    told = f"{_ago(health.age_seconds)} ago"
    return [health.service, state, told, health.source, health.host, str(reason or "")]


def _ago(seconds: float) -> str:
    """Return a time in two figures or so."""
    for limit, unit in ((60.0, "s"), (60.0, "min"), (24.0, "h")):
        if seconds < limit:
            return f"{seconds:.0f} {unit}"
        seconds /= limit
    return f"{seconds:.0f} d"
