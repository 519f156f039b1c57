"""How everything stands, as it was told over the bus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import JsonValue

from esper.bus.bus import HEALTH, Bus, Delivery, entry_order
from esper.bus.envelope import Envelope, MessageRefusedError, open_envelope
from esper.bus.messages import HealthMessage, message_in
from esper.signing import Keyring
from esper.supervision.health_teller import HEALTH_SECONDS
from esper.supervision.status import ServiceState

SILENT_SECONDS = 4.0 * HEALTH_SECONDS
_ENDED = {ServiceState.STOPPED.value, ServiceState.FINISHED.value}


@dataclass(frozen=True, kw_only=True)
class Health:
    """What one program, or its supervisor for it, has said last.

    Attributes:
        source: Run, or supervisor, that says it.
        service: The program.
        host: Machine it runs on.
        pid: 0 where it does not run.
        state: As it was said.
        age_seconds: Since then, by the sender's clock and this one.
        details: More, as its sender likes.
    """

    source: str
    service: str
    host: str
    pid: int
    state: str
    age_seconds: float
    details: dict[str, JsonValue]

    @property
    def is_old(self) -> bool:
        """Whether no supervisor tells of it any more: one that lives does, whatever the state."""
        return self.age_seconds > SILENT_SECONDS

    @property
    def is_silent(self) -> bool:
        """Whether it should have said something since."""
        return self.is_old and self.state not in _ENDED

    @property
    def needs_a_person(self) -> bool:
        """Whether it is given up or silent."""
        return self.is_silent or self.state == ServiceState.GIVEN_UP


@dataclass(frozen=True, kw_only=True)
class HealthOnBus:
    """What is known of all.

    Attributes:
        services: The newest of each, by name.
        refused: How many messages were not signed by a key here, or could not be read.
    """

    services: Sequence[Health]
    refused: int


def read_health(bus: Bus, keyring: Keyring, *, now_seconds: float) -> HealthOnBus:
    """Read what was told last; what no key here has signed is only counted.

    Args:
        bus: To read.
        keyring: Verifies.
        now_seconds: Since the Unix epoch.

    Raises:
        BusUnavailableError: The server is away.
        BusRefusedError: It does not let this user in.
    """
    newest: dict[tuple[str, str], tuple[_Moment, Health]] = {}
    refused = 0
    for delivery in bus.latest(HEALTH, limit=HEALTH.max_length or 1):
        try:
            envelope = open_envelope(delivery.message, keyring)
            message = message_in(envelope)
        except MessageRefusedError:
            refused += 1
            continue
        if not isinstance(message, HealthMessage):
            refused += 1
            continue
        health = Health(
            source=envelope.run,
            service=message.service,
            host=message.host,
            pid=message.pid,
            state=message.state,
            age_seconds=now_seconds - envelope.time_seconds,
            details=message.details,
        )
        moment = _Moment.of(delivery, envelope)
        known = newest.get((health.source, health.service))
        if known is None or moment.replaces(known[0]):
            newest[health.source, health.service] = moment, health
    return HealthOnBus(services=[newest[key][1] for key in sorted(newest)], refused=refused)


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """When something was told.

    Attributes:
        producer: Of the message.
        number: Counts that one's messages.
        seconds: When it was sealed, and no later than the server took it: a clock may be ahead.
    """

    producer: str
    number: int
    seconds: int

    @classmethod
    def of(cls, delivery: Delivery, envelope: Envelope) -> Self:
        taken_milliseconds, _ = entry_order(delivery.entry)
        return cls(
            producer=envelope.producer,
            number=envelope.numbers.start,
            seconds=min(envelope.time_seconds, taken_milliseconds // 1000),
        )

    def replaces(self, known: Self) -> bool:
        """Return whether it is later than one that the server took before it.

        One supervisor counts its messages, whatever its clock says meanwhile. Of two, as after a
        restart, the time tells.
        """
        if self.producer == known.producer:
            return self.number >= known.number
        return self.seconds >= known.seconds
