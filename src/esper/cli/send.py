"""`esper send`: tell a run what to do."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from esper.bus.bus import BusRefusedError, BusUnavailableError
from esper.bus.command_sender import CommandSender, NoAnswerError, this_user
from esper.bus.messages import AnswerMessage
from esper.cli.command_line import command_line
from esper.cli.kept_settings import kept_settings
from esper.experiments.bus_connection import open_run_bus
from esper.experiments.settings import SettingsError
from esper.lifecycle.actions import Operation, action_from_dump
from esper.lifecycle.commands import Act, Command, Pause, Resume, SaveCheckpoint, Stop
from esper.signing import KeyFileError, Keyring
from esper.telemetry.run_folder import RunFolderError, is_written
from esper.telemetry.run_reader import RunReader

_PLAIN: dict[str, Command] = {
    "pause": Pause(),
    "resume": Resume(),
    "checkpoint": SaveCheckpoint(),
    "stop": Stop(),
}
_ARGUMENTS = {
    Operation.GERMINATE: ("slot", "blueprint"),
    Operation.ADVANCE: ("slot",),
    Operation.SET_ALPHA_TARGET: ("slot", "target", "steps"),
    Operation.PRUNE: ("slot",),
    Operation.COMMIT: ("slot",),
}
_WORDS = (
    *(f"{name} {' '.join(names).upper()}" for name, names in _ARGUMENTS.items()),
    *_PLAIN,
)
EXIT_REFUSED = 1
EXIT_NOT_HEARD = 3


def send(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Run folder; or, with --bus, the id of a run anywhere."),
    ],
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help=f"One of: {'; '.join(_WORDS)}.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A further field of the action, as over_steps=20."
        ),
    ] = None,
    bus: Annotated[
        str | None, typer.Option(help="Address of the server; default the run's own.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Keys; default the run's, or the user's own.")
    ] = None,
    sender: Annotated[
        str | None, typer.Option(help="Who asks, for the run's events; default USER@HOST.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for an answer.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Tell RUN what to do between its next two steps, and print what came of it.

    Exit code 0: it was done; 1: it was refused; 3: nothing was heard in time.
    """
    command = _command(words, set_ or [])
    run_id, address, keys = _addressed(run, bus, key_file)
    try:
        keyring = Keyring.of_user() if keys is None else Keyring.from_file(keys)
        opened = open_run_bus(address)
        asking = CommandSender(opened, keyring, run_id, sender=sender or this_user())
    except (KeyFileError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    try:
        answer = asking.send(command, wait_seconds=wait)
    except BusRefusedError as error:
        raise typer.BadParameter(str(error)) from error
    except (BusUnavailableError, NoAnswerError) as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_NOT_HEARD) from error
    finally:
        opened.close()
    _print(answer, as_json=as_json)
    if not answer.outcome.done:
        raise typer.Exit(EXIT_REFUSED)


def _command(words: list[str], settings: list[str]) -> Command:
    """Return what the words say.

    Raises:
        typer.BadParameter: They say nothing that is known.
    """
    name, given = words[0], words[1:]
    if name in _PLAIN:
        if given or settings:
            raise typer.BadParameter(f"{name} takes nothing further, got {[*given, *settings]}")
        return _PLAIN[name]
    if name not in set(_ARGUMENTS):
        raise typer.BadParameter(f"no command {name!r}; commands: {'; '.join(_WORDS)}")
    names = _ARGUMENTS[Operation(name)]
    if len(given) != len(names):
        raise typer.BadParameter(
            f"{name} takes {' '.join(names).upper()}, got {' '.join(given) or 'nothing'}"
        )
    fields: dict[str, Any] = {"operation": name, **dict(zip(names, given, strict=True))}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise typer.BadParameter(f"a setting is key=value, got {setting!r}")
        fields[key] = _value(text)
    try:
        return Act(action=action_from_dump(fields))
    except ValidationError as error:
        problems = "; ".join(f"{issue['loc'][-1]}: {issue['msg']}" for issue in error.errors())
        raise typer.BadParameter(f"{name}: {problems}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _addressed(run: str, bus: str | None, key_file: Path | None) -> tuple[str, str, Path | None]:
    """Return a run's id, where it listens, and the keys that it takes.

    Raises:
        typer.BadParameter: It listens nowhere, or there is no such run here.
    """
    if bus is not None and not Path(run).is_dir():
        return run, bus, key_file
    try:
        reader = RunReader(Path(run))
        config = kept_settings(reader)
    except (RunFolderError, SettingsError) as error:
        hint = "; of a run on another machine give its id, and --bus" if bus is None else ""
        raise typer.BadParameter(f"{error}{hint}") from error
    if not is_written(Path(run)):
        standing = reader.standing
        onward = "" if standing == "finished" else f"; go on with: {command_line('resume', run)}"
        raise typer.BadParameter(f"no process trains {run} now, it is {standing}{onward}")
    address = bus or config.bus.commands
    if address is None:
        raise typer.BadParameter(
            f"{run} listens to no bus: start it with --set bus.commands=redis://HOST:PORT/0"
        )
    return reader.run_id, address, key_file or config.bus.key_file


def _print(answer: AnswerMessage, *, as_json: bool) -> None:
    console = Console()
    if as_json:
        console.out(answer.model_dump_json(), highlight=False)
        return
    said = "done" if answer.outcome.done else "refused"
    text = f"{said} at step {answer.step}: {answer.outcome.text}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
