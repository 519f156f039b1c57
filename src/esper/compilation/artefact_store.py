"""Compiled graphs that outlive a run: signed when they are kept, verified before they are used."""

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Literal, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError

from esper.compilation.compile_request import CompileRequest
from esper.compilation.fingerprint import Fingerprint
from esper.compilation.inductor_cache import LEFTOVER_SECONDS
from esper.lifecycle.record import Record
from esper.signing import Keyring

_SUFFIX = ".artefact"
_MAGIC = b"esper artefact "
_ASIDE = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}-[0-9a-f]{16}")


class ArtefactError(ValueError):
    """An artefact that must not be used; the message says why."""


class Artefact(Record):
    """What is known of compiled graphs: what they are for, and how long making them took."""

    version: Literal[1] = 1
    request: CompileRequest
    fingerprint: Fingerprint
    checked: bool
    """Whether results and gradients were compared with the seeds' own."""
    cold_ms: float
    """Compiling, with nothing there."""
    warm_ms: float
    """The same with these files there."""
    created: float
    """Unix seconds."""
    num_bytes: Annotated[int, Field(ge=0)]
    sha256: str
    """Of the files."""


class StoredArtefact(NamedTuple):
    """An artefact that was verified."""

    artefact: Artefact
    files: bytes
    """A zip archive for the compiler's cache folder."""


class ArtefactStore:
    """Keeps artefacts in a folder, or in an object store by its URL.

    An artefact is one object: a line with the signature, one with its description as JSON, and the
    compiler's files. The signature covers all that follows it; nothing is parsed, unpacked or
    unpickled before it is verified.

    Args:
        url: A folder, or a URL of fsspec, as `s3://bucket/esper`.
        keyring: Signs and verifies.
        fingerprint: Of the machine; None is this one's.
        clock: Unix seconds.

    Raises:
        ValueError: The URL's scheme is unknown.
        ImportError: Its scheme needs a package that is not installed.
    """

    def __init__(
        self,
        url: str,
        keyring: Keyring,
        *,
        fingerprint: Fingerprint | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.keyring = keyring
        self.fingerprint = fingerprint or Fingerprint.here()
        self._clock = clock
        self._files, self._root = fsspec.core.url_to_fs(url)
        self.url: str = self._root if type(self._files) is LocalFileSystem else url
        """The same store for a process that works elsewhere."""

    def save(
        self,
        request: CompileRequest,
        files: bytes,
        *,
        checked: bool,
        cold_ms: float,
        warm_ms: float,
    ) -> Artefact:
        """Sign and keep the compiler's files for a request; one that is there is replaced.

        Raises:
            OSError: The store cannot be written.
        """
        artefact = Artefact(
            request=request,
            fingerprint=self.fingerprint,
            checked=checked,
            cold_ms=cold_ms,
            warm_ms=warm_ms,
            created=self._clock(),
            num_bytes=len(files),
            sha256=hashlib.sha256(files).hexdigest(),
        )
        name = self.name_of(request)
        signed = artefact.model_dump_json().encode() + b"\n" + files
        signature = self.keyring.signature(_bound(name, signed)).encode()
        self._files.makedirs(self._root, exist_ok=True)
        # Written aside and moved, so that what has the name is whole.
        aside = f"{self._root}/{name}-{secrets.token_hex(8)}"
        try:
            self._files.pipe_file(aside, _MAGIC + signature + b"\n" + signed)
            self._files.mv(aside, self._place(name))
        except BaseException:
            with suppress(OSError):
                self._files.rm_file(aside)
            raise
        return artefact

    def load(self, request: CompileRequest) -> StoredArtefact | None:
        """Return the verified artefact for a request; None if there is none.

        Raises:
            ArtefactError: It is not what was signed, or there is only one of another machine.
            OSError: The store cannot be read.
        """
        name = self.name_of(request)
        self._files.invalidate_cache()  # another process may have saved since it was listed
        stored = self._verified(name)
        if stored is None:
            for other in self.names():
                if other.startswith(f"{request.digest}-"):
                    self._verified(other)  # tells why not
        elif stored.artefact.request.digest != request.digest:
            raise ArtefactError(f"{self._place(name)} is for another request")
        return stored

    def names(self) -> Iterator[str]:
        """Yield the names of what is kept, verified or not.

        Raises:
            OSError: The store cannot be read.
        """
        if self._files.exists(self._root):
            for path in sorted(self._files.ls(self._root, detail=False, refresh=True)):
                name = path.rpartition("/")[2]
                if name.endswith(_SUFFIX):
                    yield name.removesuffix(_SUFFIX)

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed has left of `save`, an hour ago or earlier.

        Raises:
            OSError: The store cannot be read.
        """
        if not self._files.exists(self._root):
            return
        for path in self._files.ls(self._root, detail=False, refresh=True):
            if _ASIDE.fullmatch(path.rpartition("/")[2]):
                with suppress(FileNotFoundError):  # another process may have come first
                    age = self._clock() - self._files.modified(path).timestamp()
                    if age > LEFTOVER_SECONDS:
                        self._files.rm_file(path)

    def describe(self, name: str) -> Artefact:
        """Return what is known of an artefact, verified as for use.

        Args:
            name: One of `names`.

        Raises:
            ArtefactError: It is not what was signed, or was made for another machine.
            OSError: The store cannot be read.
        """
        stored = self._verified(name)
        if stored is None:
            raise ArtefactError(f"there is no {self._place(name)}")
        return stored.artefact

    def name_of(self, request: CompileRequest) -> str:
        """Return the name of a request's artefact; machines of several kinds have several."""
        return f"{request.digest}-{self.fingerprint.digest[:16]}"

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}{_SUFFIX}"

    def _verified(self, name: str) -> StoredArtefact | None:
        place = self._place(name)
        try:
            with self._files.open(place, "rb") as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            return None
        header, separator, signed = content.partition(b"\n")
        signature = header.removeprefix(_MAGIC).decode("ascii", "replace")
        if not separator or not self.keyring.verifies(_bound(name, signed), signature):
            raise ArtefactError(
                f"{place} is not what was signed with these keys: it is damaged, was changed, or "
                "comes from someone else"
            )
        description, _, files = signed.partition(b"\n")
        try:
            artefact = Artefact.model_validate_json(description)
        except ValidationError as error:
            raise ArtefactError(f"{place} was written by another version of esper") from error
        if hashlib.sha256(files).hexdigest() != artefact.sha256:
            raise ArtefactError(f"the files in {place} are not those that it describes")
        if artefact.fingerprint != self.fingerprint:
            differences = self.fingerprint.differences(artefact.fingerprint)
            raise ArtefactError(f"{place} was made elsewhere: {differences}")
        return StoredArtefact(artefact, files)


def _bound(name: str, signed: bytes) -> bytes:
    """Return what is signed: an artefact under another's name is no valid one."""
    return name.encode() + b"\n" + signed
