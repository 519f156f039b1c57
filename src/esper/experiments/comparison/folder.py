"""A comparison on disk: its settings, and one file per finished run."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from esper.experiments.comparison.config import CompareConfig
from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.runs import RunResult
from esper.telemetry.environment import describe_environment

CONFIG_FILE = "compare.json"
ENVIRONMENT_FILE = "environment.json"
RESULTS_FOLDER = "runs"
SUMMARY_FILE = "summary.json"
PICTURE_FILE = "compare.png"


class ComparisonFolderError(ValueError):
    """A folder that holds another comparison, or none that this version can read."""


class ComparisonFolder:
    """Keeps a comparison; a finished run is there for good, so that any start goes on from it.

    Args:
        path: Is created; may hold the same comparison, begun earlier.
        config: Of the comparison.

    Raises:
        ComparisonFolderError: The folder holds something else, a comparison with other settings or
            one made with another version of Python, torch or Esper.
    """

    def __init__(self, path: Path, config: CompareConfig) -> None:
        self.path = path
        if (path / CONFIG_FILE).exists():
            self._check_same(config)
            return
        if path.exists() and any(path.iterdir()):
            raise ComparisonFolderError(f"{path} is not empty and holds no comparison")
        (path / RESULTS_FOLDER).mkdir(parents=True, exist_ok=True)
        _write(path / ENVIRONMENT_FILE, json.dumps(_environment(config), indent=2))
        _write(path / CONFIG_FILE, config.model_dump_json(indent=2))

    @staticmethod
    def config_of(path: Path) -> CompareConfig:
        """Return the settings of the comparison in a folder.

        Raises:
            ComparisonFolderError: There is none, or not one that this version can read.
        """
        try:
            return CompareConfig.model_validate_json((path / CONFIG_FILE).read_bytes())
        except OSError as error:
            raise ComparisonFolderError(f"{path} holds no comparison: {error}") from error
        except ValidationError as error:
            raise ComparisonFolderError(
                f"{path / CONFIG_FILE} is not of this version: {error}"
            ) from error

    def add(self, result: RunResult) -> None:
        """Keep a finished run; it is there as a whole or not at all."""
        name = f"{result.request.key}.json"
        _write(self.path / RESULTS_FOLDER / name, result.model_dump_json(indent=2))

    def results(self) -> list[RunResult]:
        """Return all finished runs.

        Raises:
            ComparisonFolderError: A file is damaged.
        """
        return _results_in(self.path)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the figures of the table as JSON."""
        _write(self.path / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False))

    @property
    def picture(self) -> Path:
        """Where the picture goes."""
        return self.path / PICTURE_FILE

    def _check_same(self, config: CompareConfig) -> None:
        kept = _flat(self.config_of(self.path).model_dump(mode="json"))
        wanted = _flat(config.model_dump(mode="json"))
        keys = sorted(
            key for key in kept.keys() | wanted.keys() if kept.get(key) != wanted.get(key)
        )
        if keys:
            differences = "; ".join(
                f"{key} is {kept.get(key)!r} there, {wanted.get(key)!r} here" for key in keys[:5]
            )
            raise ComparisonFolderError(
                f"{self.path} holds a comparison with other settings: {differences}; go on with "
                "its own, or choose another folder"
            )
        kept_environment = json.loads((self.path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        begun_with, now = map(_versions, (kept_environment, _environment(config)))
        for name, version in now.items():
            if begun_with[name] != version:
                raise ComparisonFolderError(
                    f"{self.path} was begun with {name} {begun_with[name]}, this is {version}; "
                    "figures of both would not compare, choose another folder"
                )


def _environment(config: CompareConfig) -> dict[str, Any]:
    return describe_environment(torch.device(config.run.device))


def _versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return what figures depend on; the text task's corpus is the library of Python itself."""
    packages = environment["packages"]
    versions = {name: packages[name] for name in ("torch", "esper-lite")}
    return {"Python": environment["python"], **versions, "device": environment["device"]}


def holds_comparison(path: Path) -> bool:
    """Whether a comparison was begun in a folder."""
    return (path / CONFIG_FILE).is_file()


def read_comparison(path: Path) -> Comparison:
    """Return the comparison in a folder as far as it has come, whatever machine made it.

    Raises:
        ComparisonFolderError: There is none, a file is damaged, or of another version.
    """
    return Comparison(ComparisonFolder.config_of(path), _results_in(path))


def _results_in(path: Path) -> list[RunResult]:
    results = []
    for file in sorted((path / RESULTS_FOLDER).glob("*.json")):
        try:
            results.append(RunResult.model_validate_json(file.read_bytes()))
        except ValidationError as error:
            raise ComparisonFolderError(
                f"{file} is damaged; delete it, and the run is made again: {error}"
            ) from error
    return results


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _write(file: Path, text: str) -> None:
    """Write a file as a whole: a kill leaves the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
