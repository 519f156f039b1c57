"""Brings commands from the bus to a run, and its answers back."""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from esper.bus.backoff import Backoff
from esper.bus.bus import (
    Bus,
    BusRefusedError,
    BusUnavailableError,
    Delivery,
    Subscription,
    answers_from,
    commands_for,
)
from esper.bus.envelope import (
    Envelope,
    MessageRefusedError,
    Refusal,
    Sealer,
    check_fresh,
    check_run,
    open_envelope,
)
from esper.bus.link_state import LinkState
from esper.bus.messages import AnswerMessage, CommandMessage, body_of, message_in
from esper.lifecycle.commands import Outcome
from esper.signing import Keyring
from esper.telemetry.command_log import CommandLog, LoggedCommand, Place

DEFAULT_WINDOW_SECONDS = 300.0
"""A command is refused if it was sent so long before or after it came; as Standard Webhooks."""

_GROUP = "run"
_CONSUMER = "job"
_WAIT_SECONDS = 0.2
_IDLE_SECONDS = 30.0
_RENEW_SECONDS = 10.0
_CONCERN = "commands"

Answer = Callable[[LoggedCommand], None]
Ask = Callable[[LoggedCommand, Answer], bool]


@dataclass(kw_only=True)
class _InHand:
    """The command that is being dealt with."""

    delivery: Delivery
    renewed: float
    """Monotonic seconds, when nobody else could take it for so long."""
    settled: LoggedCommand | None = None
    """Once there is something to answer."""
    refusal: str | None = None
    """Why it is a dead letter besides."""


class CommandReceiver:
    """Receives a run's commands in a thread of its own, as long as its context is open.

    One command is dealt with after the other. It is verified, bound to this run, and fresh when it
    first came; that is written to the run's log before anything else. It is acknowledged once it
    was settled and answered. One that comes again is answered from the log, and never carried out
    again.

    Args:
        bus: Has the run's commands; may be away.
        keyring: Verifies commands and signs answers.
        run: Its id.
        database_file: Of the run, which this process alone writes.
        ask: Lets a command be carried out; `RunControl.ask`.
        link: Is told whether the bus can be reached.
        window_seconds: How far apart sending and receiving may be.
        clock: Seconds since the Unix epoch.
    """

    def __init__(
        self,
        bus: Bus,
        keyring: Keyring,
        run: str,
        *,
        database_file: Path,
        ask: Ask,
        link: LinkState,
        window_seconds: float = DEFAULT_WINDOW_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._keyring = keyring
        self._run = run
        self._database_file = database_file
        self._ask = ask
        self._link = link
        self._window_seconds = window_seconds
        self._clock = clock
        self._sealer = Sealer(keyring, run, clock=clock)
        self._settled: queue.SimpleQueue[LoggedCommand] = queue.SimpleQueue()
        """What the run has carried out, to be answered."""
        self._in_hand: _InHand | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="esper-commands", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Receive while the block runs, then answer what is settled if the bus is there."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def _receive(self) -> None:
        backoff = Backoff()
        subscription: Subscription | None = None
        log: CommandLog | None = None
        with ExitStack() as stack:
            while True:
                ending = self._stop.is_set()
                try:
                    if log is None:
                        log = stack.enter_context(CommandLog.open(self._database_file))
                    if subscription is None:
                        subscription = self._subscribed()
                    if self._in_hand is not None:
                        self._see_to(self._in_hand, subscription, wait=not ending)
                    elif not ending:
                        self._take_one(subscription, log)
                    if ending:
                        subscription.close()
                        return
                except (BusUnavailableError, BusRefusedError, sqlite3.Error) as error:
                    self._link.failed(_CONCERN, error)
                    if ending:
                        return
                    self._stop.wait(backoff.failed())
                else:
                    self._link.works(_CONCERN)
                    backoff.works()

    def _subscribed(self) -> Subscription:
        subscription = self._bus.subscribe(
            commands_for(self._run), group=_GROUP, consumer=_CONSUMER, idle_seconds=_IDLE_SECONDS
        )
        subscription.reclaim()  # of a process that had this run before, and has died
        return subscription

    def _see_to(self, in_hand: "_InHand", subscription: Subscription, *, wait: bool) -> None:
        """Answer the command in hand if it is settled, and say that it is worked on if not."""
        if in_hand.settled is None:
            try:
                in_hand.settled = self._settled.get(timeout=_WAIT_SECONDS if wait else 0.0)
            except queue.Empty:
                if time.monotonic() - in_hand.renewed > _RENEW_SECONDS:
                    subscription.renew([in_hand.delivery.entry])
                    in_hand.renewed = time.monotonic()
                return
        self._answer(in_hand.settled)
        if in_hand.refusal is None:
            subscription.acknowledge([in_hand.delivery.entry])
        else:
            subscription.refuse(in_hand.delivery, in_hand.refusal)
        self._in_hand = None

    def _take_one(self, subscription: Subscription, log: CommandLog) -> None:
        """Take one command in hand, so that a process that dies of it uses up no other's tries."""
        for delivery in subscription.receive(limit=1, wait_seconds=_WAIT_SECONDS):
            try:
                envelope, said = self._opened(delivery)
            except MessageRefusedError as error:
                subscription.refuse(delivery, f"{error.refusal}: {error}")
                continue
            now = self._clock()
            logged = log.receive(envelope.id, said.sender, said.command, received_seconds=now)
            in_hand = _InHand(delivery=delivery, renewed=time.monotonic())
            if logged.outcome is not None:
                in_hand.settled = logged
            else:
                in_hand.refusal = self._begin(envelope, logged)
                if in_hand.refusal is not None:
                    in_hand.settled = _refused(logged, in_hand.refusal, log)
            self._in_hand = in_hand

    def _opened(self, delivery: Delivery) -> tuple[Envelope, CommandMessage]:
        """Return a command that may be trusted, if not yet whether it is fresh.

        Raises:
            MessageRefusedError: It may not.
        """
        envelope = open_envelope(delivery.message, self._keyring)
        check_run(envelope, self._run)
        said = message_in(envelope)
        if not isinstance(said, CommandMessage):
            raise MessageRefusedError(
                Refusal.UNKNOWN_BODY, f"message {envelope.id} is no command: {said.kind}"
            )
        return envelope, said

    def _begin(self, envelope: Envelope, logged: LoggedCommand) -> str | None:
        """Let a command be carried out, or return why it is refused."""
        try:
            check_fresh(
                envelope,
                received_seconds=logged.received_seconds,
                window_seconds=self._window_seconds,
            )
        except MessageRefusedError as error:
            return f"{error.refusal}: {error}"
        return None if self._ask(logged, self._settled.put) else "the run has ended"

    def _answer(self, logged: LoggedCommand) -> None:
        assert logged.outcome is not None
        assert logged.place is not None
        answer = AnswerMessage(
            command_id=logged.id,
            outcome=logged.outcome,
            step=logged.place.step,
            epoch=logged.place.epoch,
        )
        _, sealed = self._sealer.seal(body_of(answer))
        self._bus.publish(answers_from(self._run), [sealed])


def _refused(logged: LoggedCommand, reason: str, log: CommandLog) -> LoggedCommand:
    """Settle a command that is not carried out."""
    with log.settling(logged.id, Place(0, 0)) as outcomes:
        outcomes.append(Outcome(done=False, text=reason))
    settled = log.find(logged.id)
    assert settled is not None
    return settled
