"""A comparison on disk: its settings, and one file per finished run."""

import contextlib
import hashlib
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
from esper.policies.named import is_policy_file
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
            one made with another version of Python, torch, Esper or a policy's file; or that file
            cannot be read.
    """

    def __init__(self, path: Path, config: CompareConfig) -> None:
        self.path = path
        self._policy_files = _policy_files(config)
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
        """Keep a finished run; it is there as a whole or not at all.

        Raises:
            ComparisonFolderError: Its policy's file has changed; the run is not kept.
        """
        self._check_policy(result)
        _write(self._file_of(result), result.model_dump_json(indent=2))

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
        begun_with = _kept_versions(self.path / ENVIRONMENT_FILE)
        for name, version in _versions(_environment(config)).items():
            if begun_with[name] != version:
                raise ComparisonFolderError(
                    f"{self.path} was begun with {name} {begun_with[name]}, this is {version}; "
                    "figures of both would not compare, choose another folder"
                )
        for result in self.results():
            self._check_policy(result)

    def _check_policy(self, result: RunResult) -> None:
        policy = result.request.policy
        if result.policy_sha256 != self._policy_files.get(policy):
            raise ComparisonFolderError(
                f"{policy} has changed since {self._file_of(result)} was made with it, or while "
                "that was; bring the file back, or compare the new one in another folder"
            )

    def _file_of(self, result: RunResult) -> Path:
        return self.path / RESULTS_FOLDER / f"{result.request.key}.json"


def _environment(config: CompareConfig) -> dict[str, Any]:
    return describe_environment(torch.device(config.run.device))


def _versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return what figures depend on; the text task's corpus is the library of Python itself."""
    packages = environment["packages"]
    versions = {name: packages[name] for name in ("torch", "esper-lite")}
    return {"Python": environment["python"], **versions, "device": environment["device"]}


def _kept_versions(file: Path) -> dict[str, str]:
    try:
        return _versions(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComparisonFolderError(
            f"{file} does not tell which versions the comparison was begun with "
            f"({type(error).__name__}: {error}), and figures of two would not compare; bring the "
            "file back, or choose another folder"
        ) from error


def _policy_files(config: CompareConfig) -> dict[str, str]:
    """Return the SHA-256 of every policy that is a file.

    Raises:
        ComparisonFolderError: One cannot be read.
    """
    files = {}
    for policy in filter(is_policy_file, (config.run.policy, *config.policies)):
        try:
            files[policy] = hashlib.sha256(Path(policy).read_bytes()).hexdigest()
        except OSError as error:
            raise ComparisonFolderError(
                f"the policy file {policy} cannot be read: {error}"
            ) from error
    return files


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
