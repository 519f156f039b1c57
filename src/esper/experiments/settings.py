"""Settings from files, `key=value` words and options, merged and explained."""

import difflib
import json
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from esper.lifecycle.record import Record


class SettingsError(ValueError):
    """A setting, a file of settings or a task's name is wrong; the message says which and why."""


def merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Write `update` over `base`, mappings key by key."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings in a TOML file.

    Raises:
        SettingsError: It cannot be read.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config file {file} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config file {file} is not TOML: {error}") from error


def key_of(setting: str) -> str:
    """Return the key of `key=value`.

    Raises:
        SettingsError: It is not of that form.
    """
    key, separator, _ = setting.partition("=")
    if not separator or not key:
        raise SettingsError(f"a setting is key=value, got {setting!r}")
    return key


def parse_setting(setting: str, record: type[Record]) -> dict[str, Any]:
    """Return what `key=value` says, in the layout of `record`.

    Raises:
        SettingsError: It is not of that form.
    """
    key, text = key_of(setting), setting.partition("=")[2]
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text == "none" and _may_be_none(key, record) else text
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _may_be_none(key: str, record: Any) -> bool:
    """Whether a dotted key takes None, which TOML has no word for, and no word "none"."""
    for part in key.split("."):
        fields = getattr(record, "model_fields", {})
        if part not in fields:
            return False
        record = fields[part].annotation
    kinds = get_args(record)
    takes_words = any(isinstance(kind, type) and issubclass(kind, str) for kind in kinds)
    return type(None) in kinds and not takes_words


def explain(error: ValidationError, record: type[Record]) -> str:
    """Return in words what is wrong with settings, the nearest key that exists included."""
    lines = []
    for issue in error.errors():
        path = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(path, known_keys(record), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            lines.append(f"unknown key {path!r}{hint}")
        elif issue["type"] == "value_error":  # says itself what came
            message = str(issue["ctx"]["error"])
            lines.append(f"{path}: {message}" if path else message)
        elif issue["type"] == "tuple_type" and isinstance(issue["input"], str):
            setting = shlex.quote(f"{path}={_as_list(issue['input'])}")
            lines.append(f"{path} is a list; write --set {setting}")
        else:
            lines.append(f"{path}: {issue['msg']} (got {issue['input']!r})")
    return "; ".join(lines)


def _as_list(text: str) -> str:
    """Return the list that is meant by words with commas, as one that a shell took quotes from."""
    words = text.strip().removeprefix("[").removesuffix("]").split(",")
    return json.dumps([word.strip(" '\"") for word in words])


def known_keys(record: type[Record], prefix: str = "") -> list[str]:
    """Return every key that a record may hold, dotted."""
    keys = []
    for name, info in record.model_fields.items():
        kinds = get_args(info.annotation) or (info.annotation,)  # a section may be None, too
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Record)]
        for section in nested:
            keys += known_keys(section, f"{prefix}{name}.")
        if not nested or type(None) in kinds:
            keys.append(f"{prefix}{name}")
    return keys
