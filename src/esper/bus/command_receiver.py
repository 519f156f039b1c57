"""Brings commands from the bus to a run, and its answers back."""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
    begun: bool = False
    """Whether it was looked at: it is asked for, settled or refused then."""
    settled: LoggedCommand | None = None
    """Once there is something to answer."""
    refusal: str | None = None
    """Why it is a dead letter."""
    outcomes: queue.SimpleQueue[LoggedCommand] = field(default_factory=queue.SimpleQueue)
    """What the run has carried out; of its own, as one that was given up may be carried out yet."""


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
        self._in_hand: _InHand | None = None
        self._refuse_rest = False
        self._deadline = 0.0
        """Monotonic seconds, to end."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="esper-commands", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Receive while the block runs."""
        self.start()
        try:
            yield
        finally:
            self.stop(refuse_rest=False)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def stop(self, *, refuse_rest: bool, limit_seconds: float = 2.0) -> None:
        """Answer what is settled, and end, if the bus permits it in time.

        Args:
            refuse_rest: Whether nobody will ever carry out what is in the stream: then it is
                refused, else it waits for the process that goes on with the run.
            limit_seconds: To wait for the bus.
        """
        self._refuse_rest = refuse_rest
        self._deadline = time.monotonic() + limit_seconds
        self._stop.set()
        self._thread.join(limit_seconds)

    def _receive(self) -> None:
        backoff = Backoff()
        subscription: Subscription | None = None
        log: CommandLog | None = None
        with ExitStack() as stack:
            while not self._stop.is_set() or time.monotonic() < self._deadline:
                try:
                    log = log or stack.enter_context(CommandLog.open(self._database_file))
                    subscription = subscription or self._subscribed()
                    if not self._go_on(subscription, log):
                        subscription.close()
                        return
                except (BusUnavailableError, BusRefusedError, sqlite3.Error) as error:
                    self._link.failed(_CONCERN, error)
                    if subscription is not None:
                        subscription.reclaim()  # something may have come, and not been heard of
                except Exception as error:  # noqa: BLE001 – whatever it is, others can be received
                    self._link.failed(_CONCERN, error)
                    self._give_up(error)
                else:
                    self._link.works(_CONCERN)
                    backoff.works()
                    continue
                if self._stop.wait(backoff.failed()):
                    return

    def _give_up(self, error: Exception) -> None:
        """Let the command in hand be a dead letter."""
        if self._in_hand is not None:
            self._in_hand.begun, self._in_hand.settled = True, None
            self._in_hand.refusal = f"it failed here: {type(error).__name__}"

    def _subscribed(self) -> Subscription:
        subscription = self._bus.subscribe(
            commands_for(self._run), group=_GROUP, consumer=_CONSUMER, idle_seconds=_IDLE_SECONDS
        )
        subscription.reclaim()  # of a process that had this run before, and has died
        return subscription

    def _go_on(self, subscription: Subscription, log: CommandLog) -> bool:
        """Take a command in hand, or see to the one that is; return whether there may be more.

        One at a time, so that a process that dies of it uses up no other's deliveries.
        """
        ending = self._stop.is_set()
        if self._in_hand is None and (self._refuse_rest or not ending):
            wait_seconds = 0.0 if ending else _WAIT_SECONDS
            for delivery in subscription.receive(limit=1, wait_seconds=wait_seconds):
                self._in_hand = _InHand(delivery=delivery, renewed=time.monotonic())
        if self._in_hand is None:
            return not ending
        self._see_to(self._in_hand, subscription, log)
        return self._refuse_rest or not ending

    def _see_to(self, in_hand: _InHand, subscription: Subscription, log: CommandLog) -> None:
        if not in_hand.begun:
            self._begin(in_hand, log)
        if not in_hand.begun:
            self._stop.wait(_WAIT_SECONDS)
            return
        if in_hand.settled is None and in_hand.refusal is None:
            try:
                in_hand.settled = in_hand.outcomes.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                if time.monotonic() - in_hand.renewed > _RENEW_SECONDS:
                    subscription.renew([in_hand.delivery.entry])
                    in_hand.renewed = time.monotonic()
                return
        if in_hand.settled is not None:
            self._answer(in_hand.settled)
        if in_hand.refusal is None:
            subscription.acknowledge([in_hand.delivery.entry])
        else:
            subscription.refuse(in_hand.delivery, in_hand.refusal)
        self._in_hand = None

    def _begin(self, in_hand: _InHand, log: CommandLog) -> None:
        """Look at a command: let it be carried out, find what came of it, or refuse it.

        It is not begun if nobody carries it out here any more, and it is not known yet whether
        another process will: it is looked at again then.
        """
        try:
            envelope, said = self._opened(in_hand.delivery)
        except MessageRefusedError as error:
            in_hand.refusal, in_hand.begun = f"{error.refusal}: {error}", True
            return
        now = self._clock()
        logged = log.receive(envelope.id, said.sender, said.command, received_seconds=now)
        if logged.outcome is not None:
            in_hand.settled, in_hand.begun = logged, True
            return
        refusal = self._staleness(envelope, logged)
        if refusal is None and not self._ask(logged, in_hand.outcomes.put):
            if not self._refuse_rest:
                return
            refusal = "the run has ended"
        if refusal is not None:
            in_hand.settled = _refused(logged, refusal, log)
            in_hand.refusal = refusal
        in_hand.begun = True

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

    def _staleness(self, envelope: Envelope, logged: LoggedCommand) -> str | None:
        """Return why a command is refused that was under way for too long; None if it was not."""
        try:
            check_fresh(
                envelope,
                received_seconds=logged.received_seconds,
                window_seconds=self._window_seconds,
            )
        except MessageRefusedError as error:
            return f"{error.refusal}: {error}"
        return None

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
