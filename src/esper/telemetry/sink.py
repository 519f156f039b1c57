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


def as_floats(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics as Python's floats, NumPy's numbers and 0-dim tensors included.

    Raises:
        TypeError: One is no number.
    """
    floats = {}
    for name, value in metrics.items():
        try:
            floats[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"metric {name!r} must be a number, got a {type(value).__name__}: {error}"
            ) from error
    return floats
