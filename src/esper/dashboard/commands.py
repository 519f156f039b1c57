"""What a page may ask of a running run, if somebody passes it on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class OfferedAction:
    """Something that can be asked for.

    Attributes:
        name: Identifies it to the channel.
        label: On its button.
        target: Whether it is for the run, or for one slot that holds a living seed.
        question: What the page asks before it sends it; None sends it at once.
    """

    name: str
    label: str
    target: Literal["run", "slot"]
    question: str | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """An action that a person asked for."""

    run: str
    action: str
    slot: str | None


class CommandRefusedError(Exception):
    """A command had no effect; the message, which the page shows, says why."""


class CommandChannel(Protocol):
    """Passes commands on to runs. Called in a thread of the server's, one at a time per request."""

    def offers(self, run: str) -> Sequence[OfferedAction]:
        """Return what can be asked of a run now; nothing if it cannot be reached."""

    def send(self, command: Command) -> str:
        """Pass on a command that was offered; return what to tell the person.

        Raises:
            CommandRefusedError: It had no effect.
        """
