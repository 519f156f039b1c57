"""Which run folders there are under a folder, and that none leads out of it."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from esper.telemetry.run_folder import CONFIG_FILE, DATABASE_FILE, ENVIRONMENT_FILE, LOCK_FILE
from esper.telemetry.run_kind import EVALUATION_FILE

_READ_FILES = (
    DATABASE_FILE,
    f"{DATABASE_FILE}-wal",
    f"{DATABASE_FILE}-shm",
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
)

_OTHER_KINDS = (
    ("compare.json", "a comparison; see esper inspect, or its report.html"),
    (EVALUATION_FILE, "an evaluation of policies; see esper inspect"),
)
"""What tells a folder that esper made and that holds no run, and where to look at it."""

_NO_HANDLES = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A folder that is not shown.

    Attributes:
        reason: What it is or holds that is never opened, or where to look at it.
    """

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FoundRuns:
    """What a folder holds.

    Attributes:
        folders: Of runs, by id: the path from the folder on, as in "digits-1" or "search/digits-1".
        refused: What is or holds a link, a device or a pipe, has a name that cannot be shown, or is
            no run, such as a comparison.
    """

    folders: dict[str, Path]
    refused: tuple[Refusal, ...]


class RunFolders:
    """The runs in a folder, in folders directly inside it, or the one that it is itself.

    Nothing else is ever opened: a run is asked for by an id, which is looked up among the runs that
    are there, never joined to a path; and no link is followed, wherever it leads.

    Args:
        root: May itself be a link, or not exist yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def find(self) -> FoundRuns:
        """Return what is there now.

        Raises:
            OSError: Nothing can be known, as this process has too many files open.
        """
        runs: dict[str, Path] = {}
        refused: list[Refusal] = []
        for name, folder in self._candidates():
            reason = _reason_against(name, folder)
            if reason is not None:
                refused.append(Refusal(id=as_text(name), reason=reason))
            elif _holds_run(folder):
                runs[name] = folder
            elif (kind := _other_kind(folder)) is not None:
                refused.append(Refusal(id=name, reason=kind))
        return FoundRuns(folders=runs, refused=tuple(refused))

    def still_hold(self, folder: Path) -> bool:
        """Return whether a run that was found is there yet, and leads nowhere else since."""
        linked = folder.is_symlink() or folder.parent.is_symlink()
        return _holds_run(folder) and not linked and not _leads_elsewhere(folder)

    def _candidates(self) -> Iterator[tuple[str, Path]]:
        """Yield folders that may hold a run, by their path from here on."""
        # may be a link itself, even in a circle, of which `Path.resolve` raises; nothing in it may
        root = Path(os.path.realpath(self.root))
        if _is_one(root):
            yield root.name, root
            return
        for folder in _folders_in(root):
            if folder.is_symlink() or _is_one(folder):
                yield folder.name, folder
            else:
                for inner in _folders_in(folder):
                    yield f"{folder.name}/{inner.name}", inner


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            # a link first: where it leads may not even be asked, if that is in a circle
            names = [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
    except OSError as error:
        if error.errno in _NO_HANDLES:
            raise
        return []  # gone, or not ours to read: no runs for us
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _reason_against(name: str, folder: Path) -> str | None:
    if folder.is_symlink():
        return "a link"
    if not _is_shown_as_it_is(name):
        return "its name has characters that cannot be shown"
    return "holds a link, a device or a pipe" if _leads_elsewhere(folder) else None


def _is_shown_as_it_is(name: str) -> bool:
    return as_text(name) == name and name.isprintable()


def _holds_run(folder: Path) -> bool:
    return _mode(f"{folder}/{DATABASE_FILE}") is not None


def _is_one(folder: Path) -> bool:
    """Whether a folder is itself what is looked for, and nothing in it."""
    return _holds_run(folder) or _other_kind(folder) is not None


def _other_kind(folder: Path) -> str | None:
    """Return what a folder holds that is no run, and where to look at that."""
    return next(
        (kind for name, kind in _OTHER_KINDS if _mode(f"{folder}/{name}") is not None), None
    )


def _leads_elsewhere(folder: Path) -> bool:
    """Whether a file that would be read is none, such as a link or a pipe."""
    modes = [_mode(f"{folder}/{name}") for name in _READ_FILES]
    return any(mode is not None and not stat.S_ISREG(mode) for mode in modes)


def _mode(path: str) -> int | None:
    """Return what a path is, a link for itself; as text, which costs a tenth of a `Path`."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return None


def as_text(name: str) -> str:
    """Return a name with a ? for each byte that is no text."""
    return name.encode("utf-8", "replace").decode("utf-8")
