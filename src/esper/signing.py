"""Keys that sign what is read again later, perhaps by another process or machine."""

import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

MIN_KEY_BYTES = 24
_NEW_KEY_BYTES = 32
_OTHERS_MAY_READ_OR_WRITE = 0o077


class KeyFileError(ValueError):
    """A file of keys that cannot be used; the message says why."""


class Keyring:
    """Signs with HMAC-SHA256; several keys at once let one replace another.

    Args:
        keys: The first one signs, every one verifies.

    Raises:
        ValueError: There is none, or one has fewer than 24 bytes.

    Example:
        >>> ring = Keyring([b"new key, of 24 bytes or more", b"old key, of 24 bytes or more"])
        >>> old = Keyring([b"old key, of 24 bytes or more"])
        >>> ring.verifies(b"message", old.signature(b"message"))
        True
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys:
            raise ValueError("a keyring needs at least one key")
        for number, key in enumerate(keys, start=1):
            if len(key) < MIN_KEY_BYTES:
                raise ValueError(
                    f"key {number} has {len(key)} bytes, and must have {MIN_KEY_BYTES} or more; "
                    "make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
                )
        self._keys = tuple(keys)

    def __repr__(self) -> str:
        return f"Keyring({len(self._keys)} keys)"

    @classmethod
    def from_file(cls, file: Path, *, create: bool = False) -> Self:
        """Read keys from a file, one in each line; empty lines are skipped.

        Args:
            file: Readable by its owner alone.
            create: Whether a file that is not there is made, with a new random key.

        Raises:
            KeyFileError: There is no such file, it can be read by others, or a key is too short.
        """
        try:
            if create and not file.exists():
                _create(file)
            text = file.read_bytes()
            others = file.stat().st_mode & _OTHERS_MAY_READ_OR_WRITE
        except OSError as error:
            raise KeyFileError(
                f"the keys in {file} cannot be {'read or made' if create else 'read'}: {error}"
            ) from error
        if os.name == "posix" and others:
            raise KeyFileError(f"{file} can be read by others; make it yours: chmod 600 {file}")
        try:
            return cls([line.strip() for line in text.splitlines() if line.strip()])
        except ValueError as error:
            raise KeyFileError(f"{file}: {error}") from error

    @classmethod
    def of_user(cls) -> Self:
        """Read this user's own keys, from `esper/keys` in XDG_CONFIG_HOME or `~/.config`.

        Raises:
            KeyFileError: As `from_file`; or there is no home folder.

        Effects: makes the file, with a random key, if it is not there.
        """
        base = os.environ.get("XDG_CONFIG_HOME")
        try:
            folder = Path(base) if base else Path.home() / ".config"
        except RuntimeError as error:
            raise KeyFileError(
                "your own keys are in your home folder, and this user has no home folder; set HOME "
                "or XDG_CONFIG_HOME, or name a file of keys"
            ) from error
        return cls.from_file(folder / "esper" / "keys", create=True)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys themselves, for a process of one's own."""
        return self._keys

    def signature(self, message: bytes) -> str:
        """Return the signature by the first key, 64 hexadecimal digits."""
        return hmac.digest(self._keys[0], message, "sha256").hex()

    def verifies(self, message: bytes, signature: str) -> bool:
        """Return whether one of the keys has signed the message.

        Args:
            message: All that was signed.
            signature: From anywhere; what is no signature verifies nothing.
        """
        given = signature.encode("utf-8", "surrogatepass")
        expected = [hmac.digest(key, message, "sha256").hex().encode() for key in self._keys]
        return any(hmac.compare_digest(given, one) for one in expected)


def _create(file: Path) -> None:
    """Write a new key, whole before it has the file's name; another process may be faster."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_name(f".{file.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(_NEW_KEY_BYTES) + "\n")
        with suppress(FileExistsError):
            file.hardlink_to(temporary)
    finally:
        temporary.unlink()
