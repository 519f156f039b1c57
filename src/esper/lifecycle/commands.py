"""What may be asked of a run while it goes on, by whoever may send it commands."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from esper.lifecycle.actions import Action
from esper.lifecycle.record import Record


class Act(Record):
    """Change what grows: an action, legal or refused as a policy's would be."""

    command: Literal["act"] = "act"
    action: Action


class Pause(Record):
    """Make no further step until RESUME or STOP."""

    command: Literal["pause"] = "pause"


class Resume(Record):
    """Go on after PAUSE."""

    command: Literal["resume"] = "resume"


class SaveCheckpoint(Record):
    """Write a checkpoint now."""

    command: Literal["checkpoint"] = "checkpoint"


class Stop(Record):
    """Write a checkpoint and end; the run can be resumed."""

    command: Literal["stop"] = "stop"


Command = Annotated[
    Act | Pause | Resume | SaveCheckpoint | Stop,
    Field(discriminator="command"),
]
_ADAPTER: TypeAdapter[Command] = TypeAdapter(Command)


def parse_command(document: str | bytes) -> Command:
    """Read a command from JSON.

    Raises:
        pydantic.ValidationError: It is no command, or has unknown or missing fields.
    """
    return _ADAPTER.validate_json(document)


class Outcome(Record):
    """What came of a command."""

    done: bool
    """Whether it was carried out; what was refused had no effect."""
    text: str
    """The result, or the reason, for a person."""


MAX_NAME_CHARACTERS = 200
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
