"""Signs of life of a process to whoever supervises it."""

import json
import os
import select
import stat
import time
from collections.abc import Callable, MutableMapping
from typing import Self

HEARTBEAT_VARIABLE = "ESPER_HEARTBEAT_FD"
READY = "ready"

_SHORTEST_SECONDS = 1.0

Detail = str | int | float | bool | None


class Heartbeat:
    """Writes a line of JSON for each sign of life into a pipe, if there is one.

    It never waits and never raises, as what it tells of must not be stopped by it: a beat that
    finds no room is left out. So is one that comes less than a second after the last one, unless
    the state is another; that costs a look at the clock.

    Args:
        descriptor: Of the pipe's writing end; None if nobody supervises.
        clock: Monotonic seconds.

    Example:
        >>> heartbeat = Heartbeat(None)
        >>> heartbeat.beat("running", step=12)
    """

    def __init__(
        self, descriptor: int | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._descriptor = descriptor
        self._clock = clock
        self._state: str | None = None
        self._next_seconds = 0.0

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Self:
        """Return the heartbeat that the supervisor of this process has asked for, or one to nobody.

        Effects: the variable is removed and the pipe is not inherited any more, so that no process
        that this one starts can beat in its place.
        """
        named = environment.pop(HEARTBEAT_VARIABLE, "")
        if not (named.isascii() and named.isdecimal()):
            return cls(None)
        descriptor = int(named)
        try:
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                return cls(None)
            os.set_inheritable(descriptor, False)  # noqa: FBT003 – positional only
            os.set_blocking(descriptor, False)
        except (OSError, OverflowError):  # of a process further up, which has not passed it on
            return cls(None)
        return cls(descriptor)

    @property
    def is_supervised(self) -> bool:
        """Whether somebody is told."""
        return self._descriptor is not None

    def ready(self) -> None:
        """Say that what was to be made ready is; the first beat says so anyway."""
        self.beat(READY)

    def beat(self, state: str, *, step: int | None = None, **details: Detail) -> None:
        """Give a sign of life.

        Args:
            state: As "running" or "paused".
            step: How far the work is.
            details: For a person to see; left out where the line would be longer than a pipe takes
                at once.
        """
        if self._descriptor is None:
            return
        now = self._clock()
        if now < self._next_seconds and state == self._state:
            return
        line = _line(state, step, details)
        if len(line) > select.PIPE_BUF:
            line = _line(state, step, {})
        try:
            os.write(self._descriptor, line[: select.PIPE_BUF])
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            self._descriptor = None
            return
        self._state = state
        self._next_seconds = now + _SHORTEST_SECONDS


def _line(state: str, step: int | None, details: dict[str, Detail]) -> bytes:
    beat = {"state": state, "step": step, "details": details}
    return json.dumps(beat, default=str).encode() + b"\n"
