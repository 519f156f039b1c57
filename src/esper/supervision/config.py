"""What is to be served: one TOML file."""

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from esper.bus.addresses import check_no_password
from esper.lifecycle.record import Record

ROUTER = "router"
DASHBOARD = "dashboard"


class ServeConfigError(ValueError):
    """A file that says what to serve is wrong; the message says each thing that is."""


def _place(path: Path, info: ValidationInfo) -> Path:
    """Return a path as it is meant in the file: from the folder that the file is in."""
    base: Path = (info.context or {}).get("base", Path())
    try:
        return base / path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} begins with ~, and there is no such user, or no home folder; give the whole "
            "path"
        ) from error


def _host(host: str) -> str:
    try:
        host.encode("idna")  # as whoever looks it up does
    except UnicodeError as error:
        raise ValueError(
            f"{host!r} is no name of a machine, as each part between dots has 1 to 63 characters; "
            "give its name or address"
        ) from error
    return host


PlacedPath = Annotated[Path, AfterValidator(_place)]
"""Relative to the folder of the config file."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[FiniteFloat, Field(gt=0.0)]


class BusConfig(Record):
    """Where runs are told what to do, and where they tell of themselves."""

    commands: str
    """As redis://127.0.0.1:6379/0."""
    telemetry: str | None = None
    """None is the same as commands."""
    key_file: PlacedPath | None = None
    """None is the user's own keyring."""

    @model_validator(mode="after")
    def _can_be_read_and_hold_no_password(self) -> Self:
        check_no_password("bus.commands", self.commands)
        if self.telemetry is not None:
            check_no_password("bus.telemetry", self.telemetry)
        return self

    @property
    def telemetry_url(self) -> str:
        """Where telemetry goes."""
        return self.commands if self.telemetry is None else self.telemetry


class DashboardConfig(Record):
    """The page that shows the runs of a folder."""

    folder: PlacedPath = Path("runs")
    host: Host = "127.0.0.1"
    port: Port = 8265
    token_file: PlacedPath | None = None
    """Needed where host is not of this machine alone."""
    commands: bool = False
    """Whether who may open the page may command runs, over the bus."""
    silent_seconds: Seconds = 30.0


class RouterConfig(Record):
    """Writes what runs tell over the bus into run folders."""

    folder: PlacedPath = Path("runs")
    silent_seconds: Seconds = 30.0


class RestartConfig(Record):
    """How long to wait before what has died is started again."""

    first_seconds: Seconds = 1.0
    longest_seconds: Seconds = 60.0
    """The wait doubles up to this."""
    healthy_seconds: Seconds = 600.0
    """After so long without trouble, the next death counts as the first one."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """In a row; then it is given up."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.longest_seconds < self.first_seconds:
            raise ValueError(
                f"longest_seconds is {self.longest_seconds:g}, and must not be less than "
                f"first_seconds, which is {self.first_seconds:g}"
            )
        return self


class StopConfig(Record):
    """How what runs is ended."""

    drain_seconds: Seconds = 10.0
    """For a program that was asked to end; then it and all that it has started are killed."""


class JobConfig(Record):
    """A training run, as of `esper grow`."""

    name: Name
    task: Annotated[str, Field(min_length=1)]
    folder: PlacedPath
    """Of the run. One that holds a run that is not finished goes on with it."""
    config: PlacedPath | None = None
    settings: tuple[str, ...] = Field(default=(), alias="set")
    """Each KEY=VALUE."""
    silent_seconds: Seconds = 600.0
    """Without a step for so long, it hangs."""
    resume_stopped: bool = False
    """Whether a run that somebody has stopped by a command goes on."""


class ReadyConfig(Record):
    """When a service can be used: as soon as something answers at its port."""

    port: Port
    host: Host = "127.0.0.1"


class ServiceConfig(Record):
    """Any other program that is to run all the time."""

    name: Name
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """Program and arguments, no shell; it starts in the folder of the config file."""
    ready: ReadyConfig | None = None
    """None: at its first heartbeat if silent_seconds is set, else as soon as it runs."""
    ready_seconds: Seconds = 30.0
    """How long it may take to become ready."""
    silent_seconds: Seconds | None = None
    """For one that writes heartbeats: once it is ready, it hangs after so long without one."""


class ServeConfig(Record):
    """Everything that one supervisor runs."""

    folder: PlacedPath = Path("serve")
    """For status and logs."""
    bus: BusConfig | None = None
    dashboard: DashboardConfig | None = None
    router: RouterConfig | None = None
    restart: RestartConfig = RestartConfig()
    stop: StopConfig = StopConfig()
    job: tuple[JobConfig, ...] = ()
    service: tuple[ServiceConfig, ...] = ()

    @model_validator(mode="after")
    def _make_sense_together(self) -> Self:
        names = [*(service.name for service in self.service), *(job.name for job in self.job)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each name may be used once, and these are used again: {twice}")
        taken = sorted({ROUTER, DASHBOARD} & set(names))
        if taken:
            raise ValueError(f"{taken} are esper's own; give jobs and services other names")
        folders = [job.folder for job in self.job]
        if len(set(folders)) != len(folders):
            raise ValueError("each job needs a folder of its own, and two share one")
        if self.router is not None and self.bus is None:
            raise ValueError("[router] takes what comes over the bus; add [bus], or leave it out")
        if self.dashboard is not None and self.dashboard.commands and self.bus is None:
            raise ValueError("[dashboard] commands go over the bus; add [bus], or leave them out")
        if not (names or self.router or self.dashboard):
            raise ValueError("there is nothing to serve; add a [[job]], [[service]] or [dashboard]")
        return self


def load_serve_config(file: Path) -> ServeConfig:
    """Read what is to be served; paths become absolute.

    Raises:
        ServeConfigError: The file cannot be read, its path is no text, or a key or value is wrong;
            each is named, an unknown key with the nearest one that exists.
    """
    try:
        str(file.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ServeConfigError(
            f"{str(file.absolute())!a} is no text in UTF-8, and the status could not tell of it; "
            "give file and folders other names"
        ) from error
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ServeConfigError(f"{file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ServeConfigError(f"{file} is not TOML: {error}") from error
    for place in _places_of_nul(document, ()):
        raise ServeConfigError(
            f"{file}: {_shown(place)} holds a NUL character, which no path or argument may; remove "
            "it"
        )
    try:
        return ServeConfig.model_validate(document, context={"base": file.absolute().parent})
    except ValidationError as error:
        raise ServeConfigError(f"{file}: {_explain(error)}") from error


def known_keys() -> list[str]:
    """Return every key that the file may hold, dotted."""
    return [key for key, _ in _fields(ServeConfig, "")]


def keys_and_defaults() -> list[tuple[str, Any]]:
    """Return every key that the file may hold with its default, None where it may be left out.

    What must be given is `...`.
    """
    return list(_fields(ServeConfig, ""))


def _fields(record: type[Record], prefix: str) -> Iterator[tuple[str, Any]]:
    for field, info in record.model_fields.items():
        name = info.alias or field
        nested = _record_in(info.annotation)
        if nested is None:
            yield f"{prefix}{name}", ... if info.is_required() else info.default
        else:
            yield from _fields(nested, f"{prefix}{name}.")


def _record_in(annotation: Any) -> type[Record] | None:
    """Return the record that a field holds, one or many, if it does."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation
    found = (_record_in(argument) for argument in get_args(annotation))
    return next((record for record in found if record is not None), None)


def _places_of_nul(value: Any, place: tuple[int | str, ...]) -> Iterator[tuple[int | str, ...]]:
    if isinstance(value, str) and "\0" in value:
        yield place
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _places_of_nul(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places_of_nul(item, (*place, index))


def _explain(error: ValidationError) -> str:
    lines = []
    for issue in error.errors():
        shown = _shown(issue["loc"])
        if issue["type"] == "extra_forbidden":
            plain = ".".join(part for part in issue["loc"] if isinstance(part, str))
            nearest = difflib.get_close_matches(plain, known_keys(), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            lines.append(f"unknown key {shown!r}{hint}")
        elif issue["type"] == "value_error":  # says itself what came
            message = str(issue["ctx"]["error"])
            lines.append(f"{shown}: {message}" if shown else message)
        elif issue["type"] == "missing":
            lines.append(f"{shown} is missing")
        else:
            lines.append(f"{shown}: {issue['msg']} (got {issue['input']!r})")
    return "; ".join(lines)


def _shown(place: tuple[int | str, ...]) -> str:
    """Return where in the file something is: the second job's task is `job[2].task`."""
    text = ""
    for part in place:
        text += f"[{part + 1}]" if isinstance(part, int) else f"{'.' * bool(text)}{part}"
    return text
