"""Messages that were refused, or that nobody could deal with."""

import base64
import time
from typing import Self

from esper.lifecycle.record import Record


class DeadLetter(Record):
    """A message among the dead letters, and why it is there."""

    stream: str
    """That it came from."""
    entry: str
    """That it had there."""
    deliveries: int
    reason: str
    time_seconds: float
    """Since the Unix epoch, when it was given up."""
    message: str
    """As it was, in base64."""

    @classmethod
    def of(cls, message: bytes, *, stream: str, entry: str, deliveries: int, reason: str) -> Self:
        """Return the letter for a message that is given up now."""
        return cls(
            stream=stream,
            entry=entry,
            deliveries=deliveries,
            reason=reason,
            time_seconds=time.time(),
            message=base64.b64encode(message).decode(),
        )

    @property
    def content(self) -> bytes:
        """The message as it was."""
        return base64.b64decode(self.message)
