"""What tests of the bus share: keys, a message of each kind, and a clock that is moved by hand."""

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from esper.bus.bus import Bus, BusUnavailableError, Stream
from esper.bus.envelope import Envelope, open_envelope
from esper.bus.in_process import InProcessBus
from esper.bus.messages import (
    AnswerMessage,
    BundleMessage,
    CommandMessage,
    EventMessage,
    HealthMessage,
    Message,
    MetricsMessage,
    RunMessage,
    StatusMessage,
    message_in,
)
from esper.lifecycle.actions import Germinate
from esper.lifecycle.commands import Act, Outcome
from esper.lifecycle.events import (
    ContributionMeasured,
    Event,
    EventRecord,
    SeedPruned,
    StepSkipped,
)
from esper.lifecycle.stages import SeedStage
from esper.signing import Keyring

KEYRING = Keyring([b"a key of 24 bytes or more"])
OTHER_KEYRING = Keyring([b"another key of 24 bytes or more"])

PRUNED = SeedPruned(slot="layer", blueprint="norm", from_stage=SeedStage.TRAINING, reason="no use")
SKIPPED = StepSkipped(reason="bad loss", value=1.0)
"""Which is critical."""


def record(step: int, event: Event = PRUNED, *, epoch: int = 1) -> EventRecord:
    return EventRecord(time_seconds=1000.0 + step, epoch=epoch, step=step, event=event)


MESSAGES: tuple[Message, ...] = (
    CommandMessage(
        sender="somebody",
        command=Act(action=Germinate(slot="layer", blueprint="norm", options={"groups": 4})),
    ),
    AnswerMessage(
        command_id=f"{16 * '0'}-1", outcome=Outcome(done=True, text="paused"), step=7, epoch=1
    ),
    RunMessage(config={"task": "digits"}, environment={"device": "cpu"}, after_step=-1),
    EventMessage(
        record=record(
            3,
            ContributionMeasured(
                slot="layer",
                stage=SeedStage.BLENDING,
                loss_with=0.5,
                loss_without=float("nan"),
                contribution_fraction=0.1,
                standard_error_fraction=None,
            ),
        )
    ),
    MetricsMessage(epoch=1, step=3, metrics={"loss": float("inf"), "accuracy": 0.5}),
    StatusMessage(status="finished"),
    HealthMessage(service="train", state="running", pid=1, host="here", details={"step": 3}),
)
"""One of each kind."""


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


def wait_for(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Wait until something holds; fail if it does not for too long."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds:g} s"
        pause.wait(0.005)


class GatedBus(InProcessBus):
    """A bus that a test takes away, holds, or lets break in the middle of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.away = False
        self.breaks_after: int | None = None
        """Messages of the next batch that still arrive."""
        self.calls = 0

    def publish(self, stream: Stream, messages: Sequence[bytes]) -> Sequence[str]:
        self.calls += 1
        self.gate.wait()
        if self.away:
            raise BusUnavailableError("the bus is away")
        if self.breaks_after is not None:
            arriving, self.breaks_after = messages[: self.breaks_after], None
            super().publish(stream, arriving)
            raise BusUnavailableError("the bus went away in between")
        return super().publish(stream, messages)


def envelopes(bus: Bus, stream: Stream) -> list[Envelope]:
    """Return all that a stream holds, verified."""
    found = bus.latest(stream, limit=1_000_000)
    return [open_envelope(delivery.message, KEYRING) for delivery in found]


def told(bus: Bus, stream: Stream) -> list[Message]:
    """Return everything that a stream tells, verified, message by message."""
    return [one for envelope in envelopes(bus, stream) for one in all_in(envelope)]


def all_in(envelope: Envelope) -> tuple[Message, ...]:
    """Return the one message or the several that an envelope holds."""
    message = message_in(envelope)
    return message.messages if isinstance(message, BundleMessage) else (message,)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the system refuse to let a file grow further, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
