"""A folder of many runs with settings in common: these, and one file per finished run."""

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from esper.experiments.parts import usable_device
from esper.lifecycle.record import Record
from esper.policies.named import is_policy_file
from esper.telemetry.environment import describe_environment
from esper.telemetry.run_folder import LOCK_FILE, take_lock, write_whole

ENVIRONMENT_FILE = "environment.json"

ConfigT = TypeVar("ConfigT", bound=Record)
RunT = TypeVar("RunT", bound=Record)


class SeriesFolderError(ValueError):
    """A folder that holds something else, is damaged, or was begun with another version."""


@dataclass(frozen=True, kw_only=True)
class SeriesFiles(Generic[ConfigT, RunT]):
    """How a kind of series is kept.

    Attributes:
        noun: What it is called.
        config: Its settings, in `config_file`.
        run: A finished run, in a file each that `run_files` matches.
    """

    noun: str
    config: type[ConfigT]
    config_file: str
    run: type[RunT]
    run_files: str

    def begun_in(self, path: Path) -> bool:
        """Return whether such a series was begun in a folder."""
        return (path / self.config_file).is_file()

    def config_of(self, path: Path) -> ConfigT:
        """Return the settings of the series in a folder.

        Raises:
            SeriesFolderError: There is none, or not one that this version can read.
        """
        file = path / self.config_file
        try:
            return self.config.model_validate_json(file.read_bytes())
        except OSError as error:
            raise SeriesFolderError(f"{path} holds no {self.noun}: {error}") from error
        except ValidationError as error:
            raise SeriesFolderError(f"{file} is not of this version: {error}") from error

    def runs_in(self, path: Path) -> list[RunT]:
        """Return the finished runs in a folder, whatever machine made them.

        Raises:
            SeriesFolderError: A file is damaged.
        """
        runs = []
        for file in sorted(path.glob(self.run_files)):
            try:
                runs.append(self.run.model_validate_json(file.read_bytes()))
            except ValidationError as error:
                raise SeriesFolderError(
                    f"{file} is damaged; delete it, and the run is made again: {error}"
                ) from error
        return runs

    def may_begin_in(self, path: Path) -> bool:
        """Return whether a folder holds nothing but what a killed start may have left there."""
        known = (ENVIRONMENT_FILE, LOCK_FILE)
        temporary = tuple(f".{name}." for name in (ENVIRONMENT_FILE, self.config_file))
        return all(
            file.is_dir() or file.name in known or file.name.startswith(temporary)
            for file in path.rglob("*")
        )


class SeriesFolder(ABC, Generic[ConfigT, RunT]):
    """Keeps a series; a finished run is there for good, so that any start goes on from it.

    Args:
        files: How this kind is kept.
        path: Is created; may hold the same series, begun earlier.
        config: Of the series.
        device: That its runs are made on.
        policies: That decide in them.

    Raises:
        SeriesFolderError: The folder holds something else, a series with other settings, runs of
            another version of a policy's file, or too few of them and those made with another
            version of Python, torch or Esper or on another device; or a policy's file cannot be
            read.
        SettingsError: Runs are missing, and the device is none that torch can use here.
    """

    def __init__(
        self,
        files: SeriesFiles[ConfigT, RunT],
        path: Path,
        config: ConfigT,
        *,
        device: str,
        policies: Iterable[str],
    ) -> None:
        self.path = path
        self.config = config
        self._files = files
        self._device = device
        self._policy_files = _policy_files(policies)
        if files.begun_in(path):
            self._check_same()
            return
        if not files.may_begin_in(path):
            raise SeriesFolderError(f"{path} is not empty and holds no {files.noun}")
        write_whole(path / ENVIRONMENT_FILE, json.dumps(self._environment(), indent=2))
        write_whole(path / files.config_file, config.model_dump_json(indent=2))

    @abstractmethod
    def file_of(self, run: RunT) -> Path:
        """Return where a finished run is kept."""

    @abstractmethod
    def made_with(self, run: RunT) -> tuple[str, str | None]:
        """Return the policy that decided in a run, and the SHA-256 of its file if it has one."""

    @abstractmethod
    def is_complete(self, runs: Sequence[RunT]) -> bool:
        """Return whether no run is missing besides these."""

    def runs(self) -> list[RunT]:
        """Return all finished runs.

        Raises:
            SeriesFolderError: A file is damaged.
        """
        return self._files.runs_in(self.path)

    @contextlib.contextmanager
    def making_runs(self) -> Iterator[list[RunT]]:
        """Keep other processes from making runs here too; the finished ones come with it.

        A folder in which none is missing is anybody's, and need not be writable.

        Raises:
            SeriesFolderError: Another process makes runs here, or a file is damaged.
        """
        runs = self.runs()
        if self.is_complete(runs):
            yield runs
            return
        lock = take_lock(self.path)
        if lock is None:
            raise SeriesFolderError(
                f"another process makes the runs of {self.path}; wait for it, or end it first"
            )
        try:
            yield self.runs()
        finally:
            lock.release()

    def add(self, run: RunT) -> None:
        """Keep a finished run; it is there as a whole or not at all.

        Raises:
            SeriesFolderError: Its policy's file has changed; the run is not kept.
        """
        self._check_policy(run)
        write_whole(self.file_of(run), run.model_dump_json(indent=2))

    def _check_same(self) -> None:
        self._check_settings()
        runs = self.runs()
        for run in runs:
            self._check_policy(run)
        if not self.is_complete(runs):
            self._check_versions()

    def _check_settings(self) -> None:
        kept = _flat(self._files.config_of(self.path).model_dump(mode="json"))
        wanted = _flat(self.config.model_dump(mode="json"))
        keys = sorted(
            key for key in kept.keys() | wanted.keys() if kept.get(key) != wanted.get(key)
        )
        if keys:
            differences = "; ".join(
                f"{key} is {kept.get(key)!r} there, {wanted.get(key)!r} here" for key in keys[:5]
            )
            raise SeriesFolderError(
                f"{self.path} holds another {self._files.noun}, with other settings: "
                f"{differences}; go on with its own, or choose another folder"
            )

    def _check_policy(self, run: RunT) -> None:
        policy, sha256 = self.made_with(run)
        if sha256 != self._policy_files.get(policy):
            raise SeriesFolderError(
                f"{policy} has changed since {self.file_of(run)} was made with it, or while that "
                "was; bring the file back, or take the new one to another folder"
            )

    def _check_versions(self) -> None:
        """Raise where further runs would not compare with those that are there."""
        file = self.path / ENVIRONMENT_FILE
        try:
            begun_with = _versions(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SeriesFolderError(
                f"{file} does not tell which versions the {self._files.noun} was begun with "
                f"({type(error).__name__}: {error}), and figures of two would not compare; bring "
                "the file back, or choose another folder"
            ) from error
        for name, version in _versions(self._environment()).items():
            if begun_with[name] != version:
                raise SeriesFolderError(
                    f"{self.path} was begun with {name} {begun_with[name]}, this is {version}; "
                    "figures of both would not compare, choose another folder"
                )

    def _environment(self) -> dict[str, Any]:
        return describe_environment(usable_device(self._device))


def _versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return what figures depend on; the text task's corpus is the library of Python itself."""
    packages = environment["packages"]
    versions = {name: packages[name] for name in ("torch", "esper-lite")}
    return {"Python": environment["python"], **versions, "device": environment["device"]}


def _policy_files(policies: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of every policy that is a file.

    Raises:
        SeriesFolderError: One cannot be read.
    """
    files = {}
    for policy in filter(is_policy_file, policies):
        try:
            files[policy] = hashlib.sha256(Path(policy).read_bytes()).hexdigest()
        except OSError as error:
            raise SeriesFolderError(f"the policy file {policy} cannot be read: {error}") from error
    return files


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
