"""Where events and metrics go."""

from collections.abc import Mapping
from typing import Protocol

from esper.lifecycle.events import EventRecord


class Sink(Protocol):
    """Receives what happens in a run, in order.

    `publish` and `measure` are called between steps, never inside one.
    """

    def publish(self, record: EventRecord) -> None:
        """Take one event."""

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Take named values measured after an epoch."""

    def flush(self) -> None:
        """Make what was taken durable; called after every epoch."""
