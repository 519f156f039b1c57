"""Signed messages between runs and whoever watches or steers them (design name: Oona).

A `Bus` transports bytes over streams, in this process or by Redis; envelopes say who may have
written them, for which run and when; messages are what they say.
"""

from esper.bus.addresses import open_bus
from esper.bus.backoff import Backoff
from esper.bus.bus import (
    DEAD_LETTERS,
    EMERGENCY,
    HEALTH,
    MAX_DELIVERIES,
    TELEMETRY,
    Bus,
    BusRefusedError,
    BusUnavailableError,
    Delivery,
    Stream,
    Subscription,
    answers_from,
    commands_for,
)
from esper.bus.dead_letter import DeadLetter
from esper.bus.envelope import (
    Envelope,
    MessageRefusedError,
    Refusal,
    Sealer,
    check_fresh,
    check_run,
    open_envelope,
)
from esper.bus.in_process import InProcessBus
from esper.bus.link_state import LinkState
from esper.bus.messages import (
    AnswerMessage,
    CommandMessage,
    EventMessage,
    HealthMessage,
    Message,
    MetricsMessage,
    RunMessage,
    StatusMessage,
    body_of,
    message_in,
)

__all__ = [
    "DEAD_LETTERS",
    "EMERGENCY",
    "HEALTH",
    "MAX_DELIVERIES",
    "TELEMETRY",
    "AnswerMessage",
    "Backoff",
    "Bus",
    "BusRefusedError",
    "BusUnavailableError",
    "CommandMessage",
    "DeadLetter",
    "Delivery",
    "Envelope",
    "EventMessage",
    "HealthMessage",
    "InProcessBus",
    "LinkState",
    "Message",
    "MessageRefusedError",
    "MetricsMessage",
    "Refusal",
    "RunMessage",
    "Sealer",
    "StatusMessage",
    "Stream",
    "Subscription",
    "answers_from",
    "body_of",
    "check_fresh",
    "check_run",
    "commands_for",
    "message_in",
    "open_bus",
    "open_envelope",
]
