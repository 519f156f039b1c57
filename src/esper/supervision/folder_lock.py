"""One supervisor for each folder."""

from pathlib import Path

from esper.telemetry.run_folder import is_written, take_lock


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
        lock = take_lock(folder)
        if lock is None:
            raise AlreadyServedError(
                f"another esper serve has {folder}; end it first, or give this one another folder"
            )
        self._lock = lock

    def release(self) -> None:
        """Let others serve."""
        self._lock.release()


def is_served(folder: Path) -> bool:
    """Return whether a supervisor has a folder now; not known of one that cannot be looked into."""
    try:
        return is_written(folder)
    except OSError:
        return False
