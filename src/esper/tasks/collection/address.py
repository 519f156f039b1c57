"""How a data set is named on the command line: `hf:NAME` or `folder:PATH`, with settings."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from esper.own_code import OWN_SCHEME
from esper.tasks.task import TaskDataError

SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "hf:NAME": "Images with classes, or text, of the Hugging Face Hub, as hf:uoft-cs/cifar10",
        "folder:PATH": "Images in one sub-folder per class, or parquet, csv, json or txt files",
    }
)
"""What an address looks like, and what it finds."""

SETTINGS_HELP = (
    "settings follow the name, as in hf:uoft-cs/cifar100,image=img,label=fine_label: image=, "
    "label= and text= choose columns, config= a configuration, size= the pixels of a side, "
    "samples= how many rows at most to train on"
)

_ADDRESS = re.compile(
    r"(?P<scheme>[a-z]+):(?P<name>.*?)(?P<settings>(?:,\w+=[^,]*)*)", re.ASCII | re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class Address:
    """A data set and how to read it.

    Attributes:
        scheme: "hf" or "folder".
        name: A name on the hub, or a path.
        config: Which configuration of a data set on the hub.
        image: Column of the images; None is the only one there is. Likewise `label` and `text`.
        size: Pixels of an image's side; None follows the data.
        samples: Largest number of rows to train on; None is bounded by memory alone.
    """

    scheme: str
    name: str
    config: str | None = None
    image: str | None = None
    label: str | None = None
    text: str | None = None
    size: int | None = None
    samples: int | None = None


def parse_address(task: str) -> Address:
    """Read `scheme:name,key=value,…`; a comma without a key after it belongs to the name.

    Raises:
        TaskDataError: The scheme or a key is unknown, the name is missing, a value is no positive
            number where one is needed, or a folder is asked for a configuration.
    """
    match = _ADDRESS.fullmatch(task)
    schemes = [example.partition(":")[0] for example in SCHEMES]
    if match is None or match["scheme"] not in schemes:
        given, _, rest = task.partition(":")
        raise TaskDataError(
            f"no kind of task {given + ':'!r}; there are {', '.join(SCHEMES)} and {OWN_SCHEME}"
            f"{_suggestion(given, rest, schemes)}"
        )
    if not match["name"]:
        raise TaskDataError(f"task {task!r} lacks a name after the colon, as {', '.join(SCHEMES)}")
    settings: dict[str, str | int] = {}
    for setting in match["settings"].split(",")[1:]:
        key, _, value = setting.partition("=")
        settings[_known_key(key)] = _value(key, value)
    if match["scheme"] == "folder" and "config" in settings:
        raise TaskDataError(
            f"task {task!r}: a folder has no configurations, config= is for the hub; leave it out"
        )
    return Address(scheme=match["scheme"], name=match["name"], **settings)  # type: ignore[arg-type]


def address_of_anywhere(task: str) -> str:
    """Return a task's name, or a folder of data by its absolute path: the same from any folder.

    Raises:
        TaskDataError: As `expanded`.
    """
    match = _ADDRESS.fullmatch(task)
    if match is None or match["scheme"] != "folder" or not match["name"]:
        return task
    return f"folder:{expanded(match['name']).absolute()}{match['settings']}"


def expanded(path: str) -> Path:
    """Return a path with ~ written out.

    Raises:
        TaskDataError: Nobody has the name after the ~.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise TaskDataError(
            f"{path!r} cannot be found: there is no home folder {user}; write the path out, or "
            "./~… for a folder of that name"
        ) from error


def _suggestion(given: str, rest: str, schemes: Sequence[str]) -> str:
    """Return what may have been meant by a kind of task that there is not, and what follows it."""
    nearest = difflib.get_close_matches(given, schemes, n=1)
    module = given.removesuffix(".py")
    if nearest:
        meant = f"{nearest[0]}:{rest}"
    elif rest.isidentifier() and all(map(str.isidentifier, module.split("."))):
        meant = f"python:{module}:{rest}"
    else:
        return ""
    return f"; did you mean {meant!r}?"


def _known_key(key: str) -> str:
    known = [field.name for field in fields(Address)][2:]
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise TaskDataError(f"a data set has no setting {key!r};{hint} {SETTINGS_HELP}")
    return key


def _value(key: str, text: str) -> str | int:
    if key not in ("size", "samples"):
        return text
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise TaskDataError(f"{key}= takes a whole number of at least 1, got {text!r}")
    return int(text)
