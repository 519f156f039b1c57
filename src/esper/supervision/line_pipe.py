"""The reading end of a pipe for lines of JSON."""

import json
import os
from typing import Any

import anyio

_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16


class LinePipe:
    """Reads lines of JSON from a pipe without waiting for more than the next ones.

    What is no JSON, or far too long, is None in what it returns: whoever writes is another program.

    Args:
        descriptor: Of the reading end; it is closed by `close`.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._begun = b""
        self._ended = False

    async def next(self) -> list[Any] | None:
        """Wait for lines and return what they say; None once nobody can write any more."""
        while not self._ended:
            await anyio.wait_readable(self._descriptor)
            if found := self.take():
                return found
        return None

    def take(self) -> list[Any]:
        """Return what the lines say that are there already."""
        found = []
        while not self._ended:
            try:
                came = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                break
            self._ended = not came
            *lines, self._begun = (self._begun + came).split(b"\n")
            found += [_value(line) for line in lines]
            if len(self._begun) > _MAX_LINE_BYTES:
                self._begun = b""
                found.append(None)
        return found

    def close(self) -> None:
        """Close it; nobody may be waiting."""
        os.close(self._descriptor)


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
