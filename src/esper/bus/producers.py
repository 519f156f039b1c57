"""Which producers of messages tell of a run folder: so a router knows a run from its copies."""

import os
from collections.abc import Iterable
from pathlib import Path

from esper.bus.spool import SPOOL_FOLDER

_FILE = "producers"


def note_producers(folder: Path, producers: Iterable[str]) -> None:
    """Note by whom a run tells that is trained into a folder, before it tells anything.

    Each line begins with the file's inode number, which no copy of it has; and before it is a
    newline, as a full disk may have cut off the line before.

    Raises:
        OSError: It cannot be written.
    """
    file = _file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="ascii") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        stream.write("\n" + " ".join([str(inode), *producers]))


def producers_of(folder: Path) -> frozenset[str]:
    """Return by whom runs have told that were trained into a folder, and not into another one.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with _file(folder).open(encoding="ascii", errors="replace") as stream:
            inode = str(os.fstat(stream.fileno()).st_ino)
            lines = [line.split() for line in stream]
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    return frozenset(one for line in lines if line[:1] == [inode] for one in line[1:])


def _file(folder: Path) -> Path:
    return folder / SPOOL_FOLDER / _FILE
