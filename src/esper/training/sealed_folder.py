"""A folder that is written whole or not at all, and refused if a byte of it has changed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST_FILE = "manifest.json"
_MANIFEST_VERSION = 1
_CHUNK_BYTES = 1 << 20


class DamagedFolderError(ValueError):
    """A folder that is not what was written: a file is changed, or missing."""


@contextmanager
def sealed_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write into; it becomes `folder` when the block ends.

    Every file gets its SHA-256 into the manifest and is flushed to the disk. If the block raises,
    nothing is left and what stood at `folder` stays.

    Raises:
        FileExistsError: `folder` exists and `overwrite` is not set, or it holds anything that was
            not sealed.
        DamagedFolderError: Its manifest is damaged, so that what was sealed cannot be told.
    """
    folder = folder.resolve()
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"{folder} exists already; choose another folder, or pass overwrite=True"
        )
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        digests = {file.name: _digest(file) for file in temporary.iterdir()}
        (temporary / MANIFEST_FILE).write_bytes(_manifest(digests, _MANIFEST_VERSION))
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        _replace(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise if a folder could not be overwritten; where there is none, it can be made.

    Raises:
        FileExistsError: It holds anything that was not sealed.
        DamagedFolderError: Its manifest is damaged, so that what was sealed cannot be told.
    """
    folder = folder.resolve()
    if not folder.exists():
        return
    if not (folder / MANIFEST_FILE).is_file():
        raise FileExistsError(
            f"{folder} has no {MANIFEST_FILE}: it was not saved by esper, and is not replaced; "
            "choose another folder"
        )
    foreign = foreign_names(folder, _read_manifest(folder / MANIFEST_FILE))
    if foreign:
        raise FileExistsError(
            f"{folder} holds {', '.join(foreign[:5])} besides what was saved, and is not replaced; "
            "move that elsewhere, or choose another folder"
        )


def check_sealed(folder: Path) -> None:
    """Raise unless every file that was sealed is there, byte for byte; others are not looked at.

    Raises:
        FileNotFoundError: There is no such folder.
        DamagedFolderError: A file was changed or removed, or there is no valid manifest.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    for name, digest in _read_manifest(folder / MANIFEST_FILE).items():
        file = folder / name
        if not file.is_file():
            raise DamagedFolderError(f"{file} is missing")
        if _digest(file) != digest:
            raise DamagedFolderError(f"{file} was changed after it was written")


def remove_damaged(folder: Path, files: Collection[str]) -> None:
    """Remove a folder that was sealed and is damaged, so that it can be written anew.

    Args:
        folder: Is left as it is if it holds anything else than was sealed.
        files: The names of what was sealed.
    """
    try:
        check_sealed(folder)
    except FileNotFoundError:
        return
    except DamagedFolderError:
        if not foreign_names(folder, files):
            shutil.rmtree(folder)


def remove_sealed(folder: Path, files: Collection[str]) -> None:
    """Remove what was sealed, the manifest first, and the folder if nothing else is in it.

    Args:
        folder: Of a link to one the link alone goes.
        files: The names of what was sealed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    for name in (MANIFEST_FILE, *files):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def foreign_names(folder: Path, sealed: Collection[str]) -> list[str]:
    """Return the names of what is in a folder besides what was sealed, and the manifest."""
    return sorted({path.name for path in folder.iterdir()} - {*sealed, MANIFEST_FILE})


def _read_manifest(file: Path) -> dict[str, str]:
    try:
        text = file.read_bytes()
        manifest = json.loads(text)
        digests: dict[str, str] = manifest["files"]
        version = manifest["version"]
        unchanged = text == _manifest(digests, version)
    except FileNotFoundError as error:
        raise DamagedFolderError(f"{file} is missing") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFolderError(f"{file} is damaged: {error}") from error
    if version != _MANIFEST_VERSION:
        raise DamagedFolderError(
            f"{file} has version {version!r}; this esper reads version {_MANIFEST_VERSION}"
        )
    if not unchanged:
        raise DamagedFolderError(f"{file} was changed after it was written")
    return digests


def _manifest(digests: dict[str, str], version: int) -> bytes:
    ordered = {"files": dict(sorted(digests.items())), "version": version}
    return json.dumps(ordered, indent=2).encode() + b"\n"


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)
