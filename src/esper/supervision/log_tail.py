"""The last lines of what a program has printed."""

from pathlib import Path

from esper.supervision.warden import HEAD

_READ_BYTES = 16 << 10
_MAX_CHARACTERS = 300


def last_lines(log: Path, *, limit: int = 8) -> tuple[str, ...]:
    """Return what was printed last, since the program was started last; nothing if nothing was.

    Args:
        log: That its warden writes.
        limit: At most so many lines; long ones are cut.

    Raises:
        OSError: It cannot be read.
    """
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _READ_BYTES))
        end = stream.read()
    _, _, since = (b"\n" + end).rpartition(b"\n" + HEAD)
    lines = since.splitlines()
    if len(since) < len(end) + 1:
        lines = lines[1:]  # the warden's own
    told = [_plain(line.decode(errors="replace")).rstrip()[:_MAX_CHARACTERS] for line in lines]
    return tuple([line for line in told if line][-limit:])


def _plain(line: str) -> str:
    """Return a line without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in line)
