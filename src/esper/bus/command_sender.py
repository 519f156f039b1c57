"""Asking something of a run over the bus, and hearing what came of it."""

import getpass
import socket
import time
from collections.abc import Callable

from esper.bus.backoff import Backoff
from esper.bus.bus import Bus, BusUnavailableError, answers_from, commands_for
from esper.bus.envelope import MessageRefusedError, Sealer, check_run, open_envelope
from esper.bus.messages import AnswerMessage, CommandMessage, body_of, message_in
from esper.lifecycle.commands import MAX_NAME_CHARACTERS, Command
from esper.signing import Keyring

_LIMIT = 100
_WAIT_SECONDS = 0.5


class NoAnswerError(TimeoutError):
    """A command was sent, and nothing was heard of it in time; it may still be carried out."""


def this_user() -> str:
    """Return who sends from here, as USER@HOST."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this number, as in containers
        user = "somebody"
    return f"{user}@{socket.gethostname()}"[-MAX_NAME_CHARACTERS:]


class CommandSender:
    """Sends commands to one run.

    Args:
        bus: That the run listens to.
        keyring: Signs commands and verifies answers.
        run: Its id.
        sender: Who asks, for the run's events.
        clock: Monotonic seconds.

    Raises:
        ValueError: The sender's name is empty or too long.
    """

    def __init__(
        self,
        bus: Bus,
        keyring: Keyring,
        run: str,
        *,
        sender: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < len(sender) <= MAX_NAME_CHARACTERS:
            raise ValueError(
                f"the name of who asks has 1 to {MAX_NAME_CHARACTERS} characters, got {len(sender)}"
            )
        self._bus = bus
        self._keyring = keyring
        self._run = run
        self._sender = sender
        self._clock = clock
        self._sealer = Sealer(keyring, run)

    def send(self, command: Command, *, wait_seconds: float) -> AnswerMessage:
        """Ask for something, and wait until the run says what came of it.

        Sent again, as the same command, if the server goes away meanwhile, which may have lost it:
        a run carries it out once.

        Raises:
            NoAnswerError: The command was sent, and the run has said nothing in time.
            BusUnavailableError: The server could not be reached in time, and the command is not
                known to be sent.
        """
        id_, sealed = self._sealer.seal(
            body_of(CommandMessage(sender=self._sender, command=command))
        )
        ends, backoff = self._clock() + wait_seconds, Backoff()
        listens = is_there = was_sent = False
        seen: str | None = None
        while True:
            try:
                if not listens:
                    newest = self._bus.latest(answers_from(self._run), limit=1)
                    seen, listens = newest[-1].entry if newest else None, True
                if not is_there:
                    self._bus.publish(commands_for(self._run), [sealed])
                    is_there = was_sent = True
                left = max(0.0, min(_WAIT_SECONDS, ends - self._clock()))
                answers = self._bus.after(
                    answers_from(self._run), seen, limit=_LIMIT, wait_seconds=left
                )
            except BusUnavailableError as error:
                is_there = False
                wait = backoff.failed()
                if self._clock() + wait > ends:
                    if was_sent:
                        raise NoAnswerError(
                            f"the server was away before run {self._run} had answered, and the "
                            f"command may be carried out: {error}"
                        ) from error
                    raise
                time.sleep(wait)
                continue
            for delivery in answers:
                seen = delivery.entry
                answer = self._answer_in(delivery.message, id_)
                if answer is not None:
                    return answer
            if self._clock() >= ends:
                raise NoAnswerError(
                    f"run {self._run} has not answered within {wait_seconds:g} s; the command is "
                    "kept, and is carried out if the run comes to it in time"
                )

    def _answer_in(self, message: bytes, id_: str) -> AnswerMessage | None:
        """Return what a message answers to a command; None if it is about another, or forged."""
        try:
            envelope = open_envelope(message, self._keyring)
            check_run(envelope, self._run)
            said = message_in(envelope)
        except MessageRefusedError:
            return None
        return said if isinstance(said, AnswerMessage) and said.command_id == id_ else None
