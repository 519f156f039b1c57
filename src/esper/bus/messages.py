"""What messages on the bus say: the bodies of envelopes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from esper.bus.envelope import Envelope, MessageRefusedError, Refusal
from esper.lifecycle.commands import Command, Name, Outcome
from esper.lifecycle.events import EventRecord
from esper.lifecycle.record import Record
from esper.telemetry.run_folder import RunStatus


class CommandMessage(Record):
    """Somebody asks something of a run."""

    kind: Literal["command"] = "command"
    sender: Name
    """Who, as they call themselves; that they may is what the signature says."""
    command: Command


class AnswerMessage(Record):
    """A run says what came of a command."""

    kind: Literal["answer"] = "answer"
    command_id: str
    """Of the envelope that brought the command."""
    outcome: Outcome
    step: int
    epoch: int


class RunMessage(Record):
    """A run begins to tell of itself, or goes on after it was stopped."""

    kind: Literal["run"] = "run"
    config: dict[str, JsonValue]
    environment: dict[str, JsonValue]
    after_step: int
    """What was told of later steps does not hold; below 0 everything."""


class EventMessage(Record):
    """Something happened in a run."""

    kind: Literal["event"] = "event"
    record: EventRecord


class MetricsMessage(Record):
    """Values were measured in a run."""

    kind: Literal["metrics"] = "metrics"
    epoch: int
    step: int
    metrics: dict[str, float]


class BundleMessage(Record):
    """What happened and was measured in a run, several at once: signed and sent for less."""

    kind: Literal["bundle"] = "bundle"
    messages: Annotated[
        tuple[Annotated[EventMessage | MetricsMessage, Field(discriminator="kind")], ...],
        Field(min_length=1),
    ]
    """As many as the envelope's numbers say."""


class StatusMessage(Record):
    """How a run ended, or how it stands."""

    kind: Literal["status"] = "status"
    status: RunStatus


class HealthMessage(Record):
    """How a program stands, as the supervisor that runs it says."""

    kind: Literal["health"] = "health"
    service: str
    state: str
    """One of supervision's, as "ready" or "given up"."""
    pid: int
    host: str
    details: dict[str, JsonValue] = Field(default_factory=dict)


Message = Annotated[
    CommandMessage
    | AnswerMessage
    | RunMessage
    | EventMessage
    | MetricsMessage
    | BundleMessage
    | StatusMessage
    | HealthMessage,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Message)


def body_of(message: Message) -> bytes:
    """Return a message as the body of an envelope."""
    return message.model_dump_json().encode()


def message_in(envelope: Envelope) -> Any:
    """Return what an envelope says.

    Raises:
        MessageRefusedError: It is of no kind that this version knows, or has unknown, missing or
            wrong fields.
    """
    try:
        message = _ADAPTER.validate_json(envelope.body)
    except (ValidationError, RecursionError) as error:
        text = str(error).replace("\n", " ")
        raise _unknown(envelope, text[:500]) from error
    told = message.messages if isinstance(message, BundleMessage) else (message,)
    if len(told) != len(envelope.numbers):
        raise _unknown(
            envelope, f"it says that it holds {len(envelope.numbers)} messages, and has {len(told)}"
        )
    for one in told:
        if isinstance(one, EventMessage) and "schema_version" not in one.record.model_fields_set:
            raise _unknown(envelope, "the event has no schema_version")
    return message


def bundle_of(bodies: Sequence[bytes]) -> bytes:
    """Return the bodies of events and metrics as the body of one envelope."""
    if len(bodies) == 1:
        return bodies[0]
    return b'{"kind":"bundle","messages":[%s]}' % b",".join(bodies)


def _unknown(envelope: Envelope, text: str) -> MessageRefusedError:
    return MessageRefusedError(
        Refusal.UNKNOWN_BODY, f"message {envelope.id} cannot be read: {text}"
    )
