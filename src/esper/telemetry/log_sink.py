"""Events in words, to Python's own logging."""

import logging
from collections.abc import Mapping

from esper.lifecycle.events import Event, EventRecord, GateEvaluated, Priority, StageChanged
from esper.lifecycle.notable import in_words


class LogSink:
    """A sink that logs what a person would want to know of a run, a line each.

    What warns is logged as WARNING, all else as INFO; steps and metrics log nothing. A gate that
    refuses a seed is told when other checks fail than the last time, or the seed's stage has
    changed since.

    Args:
        name: Of the logger.
    """

    def __init__(self, name: str = "esper") -> None:
        self._log = logging.getLogger(name)
        self._refused: dict[str, tuple[str, ...]] = {}
        """By slot, the checks that fail as last told of the stage that its seed is in."""

    def publish(self, record: EventRecord) -> None:
        """Log an event, if it is worth a line."""
        words = in_words(record) or self._refusal(record.event)
        if words is not None:
            calm = record.event.priority is Priority.NORMAL
            self._log.log(
                logging.INFO if calm else logging.WARNING, "epoch %d: %s", record.epoch, words
            )

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Log nothing."""

    def flush(self) -> None:
        """Do nothing: what was logged is with the logger's handlers."""

    def _refusal(self, event: Event) -> str | None:
        """Return a gate's refusal in words if it is another one than the last time."""
        if isinstance(event, StageChanged):
            self._refused.pop(event.slot, None)
        if not isinstance(event, GateEvaluated) or event.result.passed:
            return None
        failing = tuple(check.name for check in event.result.failures)
        if self._refused.get(event.slot) == failing:
            return None
        self._refused[event.slot] = failing
        return str(event)
