"""The folder in which inductor keeps what it has compiled, and finds it again."""

import copyreg
import io
import os
import re
import secrets
import stat
import time
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NAME = re.compile(r"[A-Za-z0-9_+=,-][A-Za-z0-9._+=,-]*")
_LOCKS = "locks"
_INCOMING = "incoming"
"""Not read by the compiler; files are written here and then get their names."""
_HEADERS = "precompiled_headers"
"""Torch's, in its own default folder whatever CACHE_VARIABLE says."""
LEFTOVER_SECONDS = 3600.0
"""What is still being written after so long was left by a process that was killed."""


def memory_format_named(name: str) -> torch.memory_format:
    """Return the memory format of a name, as `contiguous_format`."""
    found: torch.memory_format = getattr(torch, name)
    return found


def _reduce_memory_format(memory_format: torch.memory_format) -> tuple[Any, tuple[str]]:
    return memory_format_named, (str(memory_format).removeprefix("torch."),)


# A memory format is pickled by its name in the first module of the process that has imported torch.
# Inductor's keys are of pickled tensors' layouts, so another process would not find its entries.
copyreg.pickle(torch.memory_format, _reduce_memory_format)


class CacheFolderError(RuntimeError):
    """The compiler's folder cannot be trusted; the message says why."""


def inductor_folder() -> Path:
    """Return the folder that inductor uses in this process, made if it is not there.

    It is what TORCHINDUCTOR_CACHE_DIR names. Without that variable it is `esper/inductor` in the
    user's cache folder, since torch's own default is in the folder of temporary files, where others
    can write. Precompiled C++ headers are there all the same, so that one has to be the user's own,
    too.

    Effects: sets the variable if it is not set.

    Raises:
        CacheFolderError: One of the two belongs to another user, or others may write into it:
            inductor runs what it finds there. Or it cannot be made.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else user_cache_folder() / "inductor"
    _make_ones_own(folder, CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder)  # or importing inductor sets it to torch's default
    from torch._inductor.runtime import runtime_utils  # noqa: PLC0415 – takes seconds

    default = Path(runtime_utils.default_cache_dir())  # type: ignore[attr-defined]
    for place in (default, default / _HEADERS):
        _make_ones_own(place, "TMPDIR")
    return folder


def _make_ones_own(folder: Path, variable: str) -> None:
    """Make a folder for this user alone, or see that it is one.

    Args:
        folder: Where the compiler looks.
        variable: Of the environment; names another place.

    Raises:
        CacheFolderError: It is someone else's, others may write into it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CacheFolderError(
            f"the compiler's folder {folder} cannot be made: {error}; set {variable} to another one"
        ) from error
    if os.name != "posix":
        return
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:  # a link, and what it names
        problem = "belongs to another user"
    elif folder.stat().st_mode & _OTHERS_MAY_WRITE:
        problem = "can be written by others"
    else:
        return
    raise CacheFolderError(
        f"{folder} {problem}, and the compiler runs what it finds there; remove it with all that "
        f"is in it, or set {variable} to a folder of your own"
    )


def user_cache_folder() -> Path:
    """Return where this user's caches of esper are: `esper` in XDG_CACHE_HOME or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "esper"


def pack(folder: Path) -> bytes:
    """Return a zip archive of a cache folder, its locks left out."""
    stream = io.BytesIO()
    # A clock that was never set says 1970, and zip archives know no time before 1980.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder)
            if file.is_file() and name.parts[0] not in (_LOCKS, _INCOMING):
                archive.write(file, name.as_posix())
    return stream.getvalue()


def unpack(archive: bytes, folder: Path) -> int:
    """Add an archive's files to a cache folder; those that are there already stay.

    Only for archives that were verified: the compiler runs what is in them.

    Returns:
        How many files are new.

    Raises:
        ValueError: It is no zip archive, or it names a place outside of the folder.
    """
    added = 0
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            names = opened.namelist()
            for name in names:
                _check_inside(name)
            for name in names:
                target = folder / name
                if not target.exists():
                    _write(target, opened.read(name), folder)
                    added += 1
    except zipfile.BadZipFile as error:
        raise ValueError(f"the compiler's files are no zip archive: {error}") from error
    return added


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed has left of `unpack`, an hour ago or earlier."""
    for file in (folder / _INCOMING).glob("*"):
        with suppress(FileNotFoundError):  # another process may have come first
            if time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                file.unlink()


def _check_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or not all(_NAME.fullmatch(part) for part in path.parts):
        raise ValueError(f"the compiler's files name {name!r}, which is no place in its folder")


def _write(target: Path, content: bytes, folder: Path) -> None:
    """Write a file that appears whole: the compiler takes whatever it finds in its folders."""
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = folder / _INCOMING
    incoming.mkdir(exist_ok=True)
    temporary = incoming / secrets.token_hex(16)
    temporary.write_bytes(content)
    if target.suffix == ".so":
        temporary.chmod(0o755)
    temporary.replace(target)
