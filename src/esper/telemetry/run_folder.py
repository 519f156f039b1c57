"""What a run folder holds, by which names, and who writes it."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
DATABASE_FILE = "run.sqlite"
WEIGHTS_FILE = "weights.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = ".lock"
STORE_VERSION = 1

RUN_FILES = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, LOCK_FILE),
    *(f"{DATABASE_FILE}{ending}" for ending in ("", "-wal", "-shm", "-journal")),
)
"""What a run has in its folder from the start, or now and then."""

RunStatus = Literal["running", "finished", "failed", "interrupted", "stopped"]

_LOCK_WAITS = 5
_LOCK_WAIT_SECONDS = 0.02


class RunFolderError(ValueError):
    """A run folder that exists already, is missing, or is not one this version can read."""


class WriterLock:
    """Held by the one process that writes a run folder; ends with it, however it ends.

    Raises:
        RunFolderError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = take_lock(folder)
        if descriptor is None:
            raise RunFolderError(
                f"{folder} is being written by another process; wait for it, or stop it"
            )
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others write."""
        os.close(self._descriptor)


def take_lock(folder: Path) -> int | None:
    """Return the descriptor of a folder's lock file, locked until it is closed.

    None while another process holds it. Waits a moment for those who only look whether one does.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    waits = 0
    while not _lock(descriptor):
        if waits == _LOCK_WAITS:
            os.close(descriptor)
            return None
        waits += 1
        time.sleep(_LOCK_WAIT_SECONDS)
    return descriptor


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed, and return whether that is possible.

    Args:
        descriptor: Of the file.
        shared: Others may hold a shared lock too; it is held only to see whether nobody writes.
    """
    try:
        import fcntl  # noqa: PLC0415 – not on Windows
    except ModuleNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_written(folder: Path) -> bool:
    """Return whether a process writes a run folder now, also one that it has only begun to make.

    Not known on Windows, where it is False.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a folder's config or environment."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return a folder's config or environment.

    Raises:
        RunFolderError: It cannot be read, or is no JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        to_json(document)  # what cannot be sent on, as half a surrogate pair, is no JSON either
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise RunFolderError(f"{path} does not hold a JSON object")
    return document
