"""`esper send`: tell a run what to do."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from esper.bus.addresses import check_no_password
from esper.bus.bus import BusRefusedError, BusUnavailableError
from esper.bus.command_sender import CommandSender, NoAnswerError, this_user
from esper.bus.messages import AnswerMessage
from esper.cli.command_line import command_line
from esper.cli.kept_settings import kept_settings
from esper.cli.options import bad_parameter
from esper.cli.printing import plain_console, print_json_line
from esper.experiments.bus_connection import open_run_bus
from esper.experiments.settings import SettingsError, explain, key_of, merge, parse_setting
from esper.lifecycle.actions import Advance, Commit, Germinate, Operation, Prune, SetAlphaTarget
from esper.lifecycle.commands import Act, Command, Pause, Resume, SaveCheckpoint, Stop
from esper.lifecycle.record import Record
from esper.signing import KeyFileError, Keyring
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.run_reader import RunReader

_PLAIN: dict[str, Command] = {
    "pause": Pause(),
    "resume": Resume(),
    "checkpoint": SaveCheckpoint(),
    "stop": Stop(),
}
_ACTIONS: dict[str, type[Germinate | Advance | SetAlphaTarget | Prune | Commit]] = {
    Operation.GERMINATE: Germinate,
    Operation.ADVANCE: Advance,
    Operation.SET_ALPHA_TARGET: SetAlphaTarget,
    Operation.PRUNE: Prune,
    Operation.COMMIT: Commit,
}
_ARGUMENTS = {
    name: [key for key, field in kind.model_fields.items() if field.is_required()]
    for name, kind in _ACTIONS.items()
}
"""Fields of each action that are given as words, in this order."""
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
            "--set",
            metavar="KEY=VALUE",
            help="A further field of the action, as over_steps=20 or options.rank=4.",
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
    if bus is not None:
        with bad_parameter(ValueError):
            check_no_password("--bus", bus)
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
        typer.echo(str(error), err=True)
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
    if name not in _ACTIONS:
        raise typer.BadParameter(f"no command {name!r}; commands: {'; '.join(_WORDS)}")
    kind, names = _ACTIONS[name], _ARGUMENTS[name]
    if len(given) != len(names):
        raise typer.BadParameter(
            f"{name} takes {' '.join(names).upper()}, got {' '.join(given) or 'nothing'}"
        )
    fields: dict[str, Any] = dict(zip(names, given, strict=True))
    for setting in settings:
        with bad_parameter(SettingsError):
            _refuse_given_as_word(setting, name)
            field = _field(setting, kind)
            _refuse_not_finite(setting, field)
            merge(fields, field)
    try:
        return Act(action=kind.model_validate(fields))
    except ValidationError as error:
        raise typer.BadParameter(f"{name}: {explain(error, kind)}") from error


def _refuse_given_as_word(setting: str, name: str) -> None:
    key = key_of(setting).partition(".")[0]
    if key in ("operation", *_ARGUMENTS[name]):
        raise typer.BadParameter(
            f"{name} {' '.join(_ARGUMENTS[name]).upper()} has the {key} already, got {setting}; "
            "leave one of them out"
        )


def _refuse_not_finite(setting: str, field: dict[str, Any]) -> None:
    try:
        json.dumps(field, allow_nan=False, default=str)
    except ValueError as error:
        raise typer.BadParameter(
            f"{setting} holds a number that is not finite, which JSON has no word for"
        ) from error


def _field(setting: str, kind: type[Record]) -> dict[str, Any]:
    """Return what a setting says, as `parse_setting`; of a field that holds words, its words."""
    key, parsed = key_of(setting), parse_setting(setting, kind)
    field = kind.model_fields.get(key)
    if field is not None and field.annotation is str and not isinstance(parsed[key], str):
        return {key: setting.partition("=")[2]}
    return parsed


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
    standing = reader.standing
    if standing != "running":
        over = standing == "finished" or reader.is_mirror
        onward = "" if over else f"; go on with: {command_line('resume', run)}"
        raise typer.BadParameter(f"no process trains {run} now, it is {standing}{onward}")
    address = bus or config.bus.commands
    if address is None:
        raise typer.BadParameter(
            f"{run} listens to no bus: start it with --set bus.commands=redis://HOST:PORT/0"
        )
    return reader.run_id, address, key_file or config.bus.key_file


def _print(answer: AnswerMessage, *, as_json: bool) -> None:
    console = plain_console()
    if as_json:
        print_json_line(console, answer.model_dump(mode="json"))
        return
    said = "done" if answer.outcome.done else "refused"
    console.print(f"{said} at step {answer.step}: {answer.outcome.text}", soft_wrap=True)
