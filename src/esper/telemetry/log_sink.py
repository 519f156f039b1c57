"""Events in words, to Python's own logging."""

import logging
from collections.abc import Mapping

from esper.lifecycle.events import (
    Event,
    EventRecord,
    GateEvaluated,
    GradientHealthMeasured,
    Priority,
    StageChanged,
)
from esper.lifecycle.notable import in_words


class LogSink:
    """A sink that logs what a person would want to know of a run, a line each.

    What warns is logged as WARNING, all else as INFO; steps and metrics log nothing. A gate that
    refuses a seed, and a gradient that is not as it should be, are told when something else is
    wrong than the last time, or the seed's stage has changed since.

    Args:
        name: Of the logger.
    """

    def __init__(self, name: str = "esper") -> None:
        self._log = logging.getLogger(name)
        self._wrong: dict[str, dict[str, tuple[str, ...]]] = {}
        """By slot and type of event, what is wrong as last told of its seed in this stage."""

    def publish(self, record: EventRecord) -> None:
        """Log an event, if it is worth a line."""
        words = in_words(record) or self._news(record.event)
        if words is not None:
            calm = record.event.priority is Priority.NORMAL
            self._log.log(
                logging.INFO if calm else logging.WARNING, "decision %d: %s", record.epoch, words
            )

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Log nothing."""

    def flush(self) -> None:
        """Do nothing: what was logged is with the logger's handlers."""

    def _news(self, event: Event) -> str | None:
        """Return what is wrong with a seed in words if it is something else than the last time."""
        if isinstance(event, StageChanged):
            self._wrong.pop(event.slot, None)
        if not isinstance(event, (GateEvaluated, GradientHealthMeasured)):
            return None
        told = self._wrong.setdefault(event.slot, {})
        before, told[event.type] = told.get(event.type), _wrong(event)
        return str(event) if told[event.type] not in ((), before) else None


def _wrong(event: GateEvaluated | GradientHealthMeasured) -> tuple[str, ...]:
    """Return the names of what is not as it should be."""
    if isinstance(event, GateEvaluated):
        return tuple(check.name for check in event.result.failures)
    signs = {"exploding": event.exploding, "nonfinite_steps": event.nonfinite_steps > 0}
    return tuple(name for name, seen in signs.items() if seen)
