"""What a run folder holds, by which names, and who writes it."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
DATABASE_FILE = "run.sqlite"
GROWN_FOLDER = "grown"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = ".lock"
STORE_VERSION = 1

RUN_FILES = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, LOCK_FILE),
    *(f"{DATABASE_FILE}{ending}" for ending in ("", "-wal", "-shm", "-journal")),
)
"""What a run has in its folder from the start, or now and then."""

RunStatus = Literal["running", "finished", "failed", "interrupted", "stopped"]

LOCK_SECONDS = 1.0
"""For which those who only look whether a process writes are waited for."""
_LOCK_LOOK_SECONDS = 0.02


class RunFolderError(ValueError):
    """A run folder that exists already, is missing, or is not one this version can read."""


def status_after(error: BaseException | None) -> RunStatus:
    """Return how a run has ended that this came out of; None if nothing did.

    Lightning and others make a SystemExit of Ctrl-C.
    """
    while isinstance(error, SystemExit) and error.__context__ is not None:
        error = error.__context__
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


class LockFile:
    """An open lock file, locked until it is released or the process ends, however it ends.

    A process that is forked has no part in it: else a worker that loads data would hold the lock
    for as long as it lives on.

    Args:
        file: There must be one.
        flags: That it is opened with.

    Raises:
        FileNotFoundError: There is none.
    """

    def __init__(self, file: Path, flags: int) -> None:
        self._descriptor: int | None = os.open(file, flags, 0o644)
        _open_locks.add(self)

    def take(self, *, shared: bool = False) -> bool:
        """Lock it, and return whether that is possible.

        Args:
            shared: Others may hold a shared lock too; it is held only to see whether nobody writes.
        """
        try:
            import fcntl  # noqa: PLC0415 – not on Windows
        except ModuleNotFoundError:
            return True
        assert self._descriptor is not None
        try:
            fcntl.flock(
                self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
            )
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let others have it; nothing in a process that was forked since."""
        descriptor, self._descriptor = self._descriptor, None
        _open_locks.discard(self)
        if descriptor is not None:
            os.close(descriptor)


_open_locks: set[LockFile] = set()


def _leave_locks_to_parent() -> None:
    for lock in [*_open_locks]:
        lock.release()  # by closing a copy of its descriptor, which the parent's does not feel


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_locks_to_parent)


class WriterLock:
    """Held by the one process that writes a run folder; ends with it, however it ends.

    Args:
        folder: Of the run.
        wait_seconds: For those who only look.

    Raises:
        RunFolderError: Another process holds it.
    """

    def __init__(self, folder: Path, *, wait_seconds: float = LOCK_SECONDS) -> None:
        lock = take_lock(folder, wait_seconds=wait_seconds)
        if lock is None:
            raise RunFolderError(
                f"{folder} is being written by another process; wait for it, or stop it"
            )
        self._lock = lock

    def release(self) -> None:
        """Let others write."""
        self._lock.release()


def take_lock(folder: Path, *, wait_seconds: float = LOCK_SECONDS) -> LockFile | None:
    """Return the lock of a folder, held.

    None while another process holds it. Waits a moment for those who only look whether one does.
    """
    lock = LockFile(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    until = time.monotonic() + wait_seconds
    while not lock.take():
        if time.monotonic() >= until:
            lock.release()
            return None
        time.sleep(_LOCK_LOOK_SECONDS)
    return lock


def is_written(folder: Path) -> bool:
    """Return whether a process writes a run folder now, also one that it has only begun to make.

    Not known on Windows, where it is False.
    """
    try:
        lock = LockFile(folder / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not lock.take(shared=True)
    finally:
        lock.release()


def write_whole(file: Path, text: str) -> None:
    """Write a file as `replace_file` does, in a folder that is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file as a whole: a kill or a full disk leaves the old one or the new one.

    A link leads to what is replaced. What is no file, as a pipe, is written to.

    Raises:
        OSError: It cannot be written; the file is named.
    """
    place = Path(os.path.realpath(file))
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(content)
            return
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(place)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # nothing is left of it where it has become the file


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a folder's config or environment.

    Raises:
        TypeError: A value is none that JSON has.
    """
    for key, value in document.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"{key!r} cannot be kept in {path.name}: {error}; give it as text, or as what "
                "else JSON has"
            ) from error
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
