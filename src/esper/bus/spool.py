"""What could not be sent, on the disk until it can."""

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from esper.bus.envelope import messages_in

SPOOL_FOLDER = "spool"
"""In a run's folder."""
MAX_SPOOL_BYTES = 64 << 20

_HEAD = struct.Struct("<II")
"""Before each message: its length, and the CRC-32 of the message."""
_SEGMENTS = 64
_SUFFIX = ".spool"


class Spool:
    """Keeps envelopes in their order in a folder of a bounded size; for one thread at a time.

    What is counted is the messages in them, as each says how many it holds.

    They outlive the process: whoever opens the folder next finds what was not `sent`, and perhaps
    again what was sent last. A message that a killed process was writing is cut off. When the
    folder is full, the oldest make room. The disk is never waited for, and nothing here raises
    because of it: what it does not take is given back.

    Messages are in files of a 64th of the size each, of which the last one grows and the first one
    is removed when all that is in it was sent; so no message is ever moved.

    Args:
        folder: Is made when there is something to keep; nobody else may write it.
        max_bytes: Of all files.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_SPOOL_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = max(1, max_bytes // _SEGMENTS)
        self._segments, self._next_number = _found(folder)
        self._messages = sum(segment.messages for segment in self._segments)
        self._num_bytes = sum(segment.num_bytes for segment in self._segments)
        self._descriptor: int | None = None
        """Of the last segment; None until one is begun here."""

    def __len__(self) -> int:
        return self._messages

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return self._num_bytes

    def append(self, messages: Sequence[bytes]) -> tuple[int, list[bytes]]:
        """Keep messages, behind all others.

        Returns:
            How many were dropped for good, the oldest, as there is no room for all; and the last of
            these that the disk does not take.
        """
        left = deque(messages)
        dropped = 0
        while left:
            if _size(left[0]) > self._max_bytes:
                dropped += messages_in(left.popleft())
                continue
            batch: list[bytes] = []
            num_bytes = 0
            for message in left:
                num_bytes += _size(message)
                if batch and num_bytes > self._segment_bytes:
                    break
                batch.append(message)
            dropped += self._make_room(batch)
            if not self._write(batch):
                break
            for _ in batch:
                left.popleft()
        return dropped, [*left]

    def first(self, *, limit: int) -> tuple[list[bytes], int]:
        """Return the oldest messages, at most so many, and how many were lost.

        Lost is what cannot be read any more; it is kept no longer.
        """
        lost = 0
        while self._segments:
            messages = self._segments[0].read(limit)
            if messages:
                return messages, lost
            lost += self._remove_first()
        return [], lost

    def sent(self, count: int) -> None:
        """Keep so many of the oldest no longer; they are from `first`, nothing came between."""
        segment = self._segments[0]
        self._messages -= segment.forget(count)
        if not segment.messages:
            self._remove_first()

    def close(self) -> None:
        """Let go of the files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _make_room(self, messages: Sequence[bytes]) -> int:
        """Remove the oldest segments, and return how many messages were dropped."""
        num_bytes = sum(map(_size, messages))
        dropped = 0
        while self._segments and self._num_bytes + num_bytes > self._max_bytes:
            dropped += self._remove_first()
        return dropped

    def _write(self, messages: Sequence[bytes]) -> bool:
        """Write a few into one segment, and return whether the disk has taken them."""
        data = b"".join(
            part for one in messages for part in (_HEAD.pack(len(one), zlib.crc32(one)), one)
        )
        try:
            descriptor = self._opened(len(data))
        except OSError:
            return False
        segment = self._segments[-1]
        try:
            _write_whole(descriptor, data)
        except OSError:
            try:
                os.ftruncate(descriptor, segment.num_bytes)
            except OSError:
                self.close()  # what follows half a record could not be read
            return False
        count = sum(map(messages_in, messages))
        segment.num_bytes += len(data)
        segment.messages += count
        self._num_bytes += len(data)
        self._messages += count
        return True

    def _opened(self, more_bytes: int) -> int:
        """Return the descriptor of the last segment, a new one unless there is room in it."""
        if self._descriptor is not None:
            full = self._segments[-1].num_bytes + more_bytes > self._segment_bytes
            if not full:
                return self._descriptor
            self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._next_number:09}{_SUFFIX}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self._next_number += 1
        self._segments.append(_Segment(path))
        return self._descriptor

    def _remove_first(self) -> int:
        """Remove the first segment, and return how many messages in it were not sent."""
        segment = self._segments.popleft()
        if not self._segments:
            self.close()
        with suppress(OSError):
            segment.path.unlink()
        self._messages -= segment.messages
        self._num_bytes -= segment.num_bytes
        return segment.messages


class _Segment:
    """One file of messages.

    Attributes:
        num_bytes: Of the file, as far as it is whole.
        messages: That were not sent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.messages = 0
        self._sent_bytes = 0
        self._read: list[tuple[int, int]] = []
        """Of each envelope that was read last, its bytes with their head, and its messages."""

    def scan(self) -> None:
        """Find what a file of another process holds, and cut off what is not whole.

        Raises:
            OSError: It cannot be read.
        """
        found = [*_messages(self.path.read_bytes())]
        self.num_bytes = sum(_HEAD.size + len(message) for message in found)
        self.messages = sum(map(messages_in, found))
        with suppress(OSError):  # it is not read any further in any case
            os.truncate(self.path, self.num_bytes)

    def read(self, limit: int) -> list[bytes]:
        """Return the first messages that were not sent; none, where they cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._sent_bytes)
                content = file.read(self.num_bytes - self._sent_bytes)
        except OSError:
            content = b""
        messages = [*islice(_messages(content), limit)]
        self._read = [(_HEAD.size + len(one), messages_in(one)) for one in messages]
        return messages

    def forget(self, count: int) -> int:
        """Take note that the first of what was read last is sent; return how many messages."""
        assert count <= len(self._read)
        self._sent_bytes += sum(num_bytes for num_bytes, _ in self._read[:count])
        messages = sum(messages for _, messages in self._read[:count])
        self.messages -= messages
        del self._read[:count]
        return messages


def _found(folder: Path) -> tuple[deque[_Segment], int]:
    """Return the segments that other processes left, and the number of the next one."""
    segments: deque[_Segment] = deque()
    number = 0
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if not path.stem.isdecimal():
            continue
        number = int(path.stem)
        segment = _Segment(path)
        with suppress(OSError):
            segment.scan()
            segments.append(segment)
    return segments, number + 1


def _messages(content: bytes) -> Iterator[bytes]:
    """Yield messages up to the first one that is not whole."""
    place = 0
    while place + _HEAD.size <= len(content):
        length, checksum = _HEAD.unpack_from(content, place)
        message = content[place + _HEAD.size : place + _HEAD.size + length]
        if len(message) < length or zlib.crc32(message) != checksum:
            return
        yield message
        place += _HEAD.size + length


def _size(message: bytes) -> int:
    return _HEAD.size + len(message)


def _write_whole(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
