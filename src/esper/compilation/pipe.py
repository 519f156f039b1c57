"""Objects between a process and one that it has started; nothing here reads files or networks."""

import pickle
import struct
from collections.abc import Callable
from typing import IO, Any

_LENGTH = struct.Struct(">Q")


def pack_object(value: Any) -> bytes:
    """Return an object as bytes, for a process of one's own.

    Raises:
        Exception: Whatever an object raises that cannot be pickled.
    """
    return pickle.dumps(value)


def unpack_object(content: bytes) -> Any:
    """Return the object again; runs whatever the bytes say.

    Raises:
        AttributeError: A class is not where it was.
        ImportError: Its module cannot be imported here.
    """
    return pickle.loads(content)  # noqa: S301 – from the process that has started this one


def send(stream: IO[bytes], value: Any) -> None:
    """Write one object.

    Raises:
        OSError: The other process has ended.
    """
    content = pack_object(value)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def receive_bytes(read: Callable[[int], bytes]) -> bytes:
    """Read one object as bytes, for `unpack_object`.

    Args:
        read: Returns as many bytes as asked for, or fewer where the stream ends.

    Raises:
        EOFError: The stream has ended.
    """
    (length,) = _LENGTH.unpack(_whole(read, _LENGTH.size))
    return _whole(read, length)


def receive(read: Callable[[int], bytes]) -> Any:
    """Read one object; as `receive_bytes`, then `unpack_object`."""
    return unpack_object(receive_bytes(read))


def _whole(read: Callable[[int], bytes], length: int) -> bytes:
    content = read(length)
    if len(content) < length:
        raise EOFError
    return content
