"""One supervisor for each folder."""

import os
import time
from pathlib import Path

from esper.telemetry.run_folder import LOCK_FILE, is_written

_WAITS = 5
_WAIT_SECONDS = 0.02


class AlreadyServedError(RuntimeError):
    """Another supervisor has the folder."""


class FolderLock:
    """Held by the one supervisor of a folder; ends with it, however it ends.

    Args:
        folder: Is made if it is not there.

    Raises:
        AlreadyServedError: Another one holds it.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        waits = 0
        while not _lock(self._descriptor):
            if waits == _WAITS:
                os.close(self._descriptor)
                raise AlreadyServedError(
                    f"another esper serve has {folder}; end it first, or give this one another "
                    "folder"
                )
            waits += 1
            time.sleep(_WAIT_SECONDS)  # who only looks whether somebody serves holds it too

    def release(self) -> None:
        """Let others serve."""
        os.close(self._descriptor)


def is_served(folder: Path) -> bool:
    """Return whether a supervisor has a folder now."""
    return is_written(folder)


def _lock(descriptor: int) -> bool:
    import fcntl  # noqa: PLC0415 – not on Windows

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
