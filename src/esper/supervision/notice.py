"""What a supervisor tells a person as it happens."""

import time

from pydantic import Field

from esper.lifecycle.record import Record
from esper.supervision.status import ServiceState


class Notice(Record):
    """Something has changed."""

    time_seconds: float = Field(default_factory=time.time)
    """Since the Unix epoch."""
    about: str
    """A program's name; "serve" is the supervisor itself."""
    state: ServiceState | None = None
    """That the program is in now."""
    text: str | None = None
    """Why, or what else there is to say."""
    lines: tuple[str, ...] = ()
    """What the program has printed before it died."""


SERVE = "serve"
