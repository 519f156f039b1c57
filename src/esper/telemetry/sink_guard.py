"""Several sinks, none of which can stop training or keep anything from another one."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from esper.lifecycle.events import Event, EventRecord, SinkFailed, SinkLossesCounted
from esper.telemetry.sink import Sink

_AnySink = TypeVar("_AnySink", bound=Sink)

_LOG = logging.getLogger(__name__)


class SinkGuard:
    """A sink that passes everything on to several, in their order.

    One that raises is called again whenever there is something to take: a full disk may have room
    by then. Its first error is a `SinkFailed` to the others, or is logged where no other one takes
    it; what it did not take is counted. KeyboardInterrupt and SystemExit pass.

    Args:
        sinks: To be guarded.
        stamp: Makes a record of an event that happens now.
        beginning: Returns what each sink is told before anything else.
    """

    def __init__(
        self,
        sinks: Iterable[Sink],
        *,
        stamp: Callable[[Event], EventRecord],
        beginning: Callable[[], Event],
    ) -> None:
        self.sinks = list(sinks)
        self._stamp = stamp
        self._beginning = beginning
        self._begun: list[Sink] = []
        """Those that know of the beginning, by identity."""
        self._lost_calls: list[tuple[Sink, int]] = []
        """By identity: a sink need not be hashable."""

    def begin(self) -> None:
        """Tell the beginning to each sink that does not know of it."""
        for sink in tuple(self.sinks):
            self._begin(sink)

    def go_on(self) -> None:
        """Take it that all sinks know of the beginning, as those of a run that goes on."""
        self._begun = list(self.sinks)

    def publish(self, record: EventRecord) -> None:
        """Pass on one event."""
        self.begin()
        for sink in tuple(self.sinks):
            self.attempt(sink, lambda sink: sink.publish(record))

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on named values."""
        self.begin()
        for sink in tuple(self.sinks):
            self.attempt(sink, lambda sink: sink.measure(epoch, step, metrics))

    def flush(self) -> None:
        """Let every sink make durable what it has taken."""
        for sink in tuple(self.sinks):
            self.attempt(sink, lambda sink: sink.flush())

    def attempt(self, sink: _AnySink, call: Callable[[_AnySink], object]) -> None:
        """Call a sink; an error of its is told once, and counts as something lost."""
        error = _error_of(sink, call)
        if error is not None and self._count(sink) == 1:
            self._report(sink, error)

    @property
    def losses(self) -> tuple[SinkLossesCounted, ...]:
        """Return how much each sink that failed has not taken so far."""
        return tuple(
            SinkLossesCounted(sink=_name(sink), lost_calls=lost) for sink, lost in self._lost_calls
        )

    def _begin(self, sink: Sink) -> None:
        """Tell the beginning to a sink that does not know of it."""
        if not any(sink is known for known in self._begun):
            self._begun.append(sink)  # first: where it fails others are told, and come back to it
            self.attempt(sink, lambda sink: sink.publish(self._stamp(self._beginning())))

    def _count(self, sink: Sink) -> int:
        """Count one more lost call of a sink, and return how many there are."""
        for index, (failing, lost) in enumerate(self._lost_calls):
            if failing is sink:
                self._lost_calls[index] = (sink, lost + 1)
                return lost + 1
        self._lost_calls.append((sink, 1))
        return 1

    def _report(self, failing: Sink, error: Exception) -> None:
        event = SinkFailed(sink=_name(failing), error=f"{type(error).__name__}: {error}")
        record = self._stamp(event)
        heard = False
        for sink in tuple(self.sinks):
            if sink is failing:
                continue
            self._begin(sink)
            problem = _error_of(sink, lambda sink: sink.publish(record))
            heard = heard or problem is None
            if problem is not None and self._count(sink) == 1:
                self._report(sink, problem)
        if not heard:
            _LOG.warning("%s failed, training goes on: %s", event.sink, event.error)


def _error_of(sink: _AnySink, call: Callable[[_AnySink], object]) -> Exception | None:
    try:
        call(sink)
    except Exception as error:  # noqa: BLE001 – whatever a sink raises, training goes on
        return error
    return None


def _name(sink: Sink) -> str:
    return type(sink).__name__
