"""A text endpoint that Prometheus scrapes."""

import itertools
import re
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, final

from esper.lifecycle.events import (
    Event,
    EventRecord,
    RunWentBack,
    SeedCommitted,
    SeedGerminated,
    SeedPruned,
    StageChanged,
)
from esper.lifecycle.stages import SeedStage
from esper.telemetry.run_folder import RunStatus
from esper.telemetry.tracked_values import run_values, slot_values
from esper.telemetry.tracker import Tracker, TrackerError

if TYPE_CHECKING:
    from prometheus_client import Gauge

DEFAULT_PORT = 9464

_NEEDS_PROMETHEUS = "PrometheusSink needs prometheus-client: pip install 'esper-lite[prometheus]'"
_REFUSED_CHARACTERS = re.compile(r"[^A-Za-z0-9_]")
_OF_A_SEED = (
    "alpha",
    "alpha_target",
    "gradient_ratio",
    "host_gradient_norm",
    "seed_gradient_norm",
    "nonfinite_steps",
    "contribution_fraction",
    "over_linear_fraction",
    "line_search_gain_fraction",
    "seed_param_count",
)
"""Gauges by slot, gone when the seed is."""
_KEPT_RECORDS = 1000
"""Of each slot: a run that goes back does so by some hundred steps."""


@final
class PrometheusSink(Tracker):
    """Serves the run's newest values over HTTP, in a thread of its own.

    The only labels are a slot's path, a stage and an event's type: the number of series follows
    from the slots, and does not grow with steps, seeds or messages. What was measured of a seed is
    gone when the seed is pruned or committed. Counters count from the start of the process.

    Args:
        host: Address to listen at; the default is not reached from other machines.
        port: 0 takes a free one, which `port` tells.
        name: Of the run, the label of esper_run_info.

    Raises:
        ModuleNotFoundError: prometheus-client is not installed.
        TrackerError: The port is in use, or the address is none of this machine's.
    """

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT, name: str = ""
    ) -> None:
        try:
            import prometheus_client as client  # noqa: PLC0415 – an optional extra
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_NEEDS_PROMETHEUS) from error
        self._client = client
        self._registry = registry = client.CollectorRegistry()
        client.Info("esper_run", "The run.", registry=registry).info({"run": name})
        self._epoch = client.Gauge("esper_epoch", "Decisions so far.", registry=registry)
        self._step = client.Gauge("esper_step", "Optimizer steps so far.", registry=registry)
        self._updated = client.Gauge(
            "esper_updated_timestamp_seconds", "When an epoch ended last.", registry=registry
        )
        self._stage = client.Enum(
            "esper_stage",
            "Stage of a slot's seed.",
            ["slot"],
            states=[stage.value for stage in SeedStage],
            registry=registry,
        )
        self._of_a_seed = {
            name: client.Gauge(
                f"esper_{name}", f"{_words(name)} in a slot.", ["slot"], registry=registry
            )
            for name in _OF_A_SEED
        }
        self._events = client.Counter("esper_events", "Events.", ["type"], registry=registry)
        self._seeds = {
            kind: client.Counter(
                f"esper_seeds_{word}", f"Seeds {word}.", ["slot"], registry=registry
            )
            for kind, word in (
                (SeedGerminated, "germinated"),
                (SeedCommitted, "committed"),
                (SeedPruned, "pruned"),
            )
        }
        self._told: dict[str, deque[EventRecord]] = {}
        """By slot, what its gauges and its stage are set by."""
        self._measured: dict[str, Gauge] = {}
        """By the name that they are measured under."""
        try:
            self._server, self._thread = client.start_http_server(port, host, registry)
        except OSError as error:
            raise TrackerError(
                f"Prometheus cannot be served at {host}:{port}: {error}; choose another port, "
                "0 takes a free one"
            ) from error
        self.host, self.port = host, self._server.server_port

    @property
    def place(self) -> str:
        """The address to scrape."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def publish(self, record: EventRecord) -> None:
        """Set what an event measures, and count it."""
        event = record.event
        self._events.labels(event.type).inc()
        self._epoch.set(record.epoch)
        self._step.set(record.step)
        for name, value in run_values(event).items():
            self._gauge(name).set(value)
        for kind, counter in self._seeds.items():
            if isinstance(event, kind):
                counter.labels(event.slot).inc()
        if isinstance(event, RunWentBack):
            self._go_back(event.to_step)
        elif (slot := getattr(event, "slot", None)) is not None:
            self._told.setdefault(slot, deque(maxlen=_KEPT_RECORDS)).append(record)
            self._follow(slot, event)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Set named values; NaN is a value to Prometheus."""
        self._epoch.set(epoch)
        self._step.set(step)
        for name, value in metrics.items():
            self._gauge(name).set(value)

    def flush(self) -> None:
        """Note the time; every value is served as soon as it is set."""
        self._updated.set(time.time())

    def close(self, status: RunStatus = "finished") -> None:
        """Stop serving, and give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _follow(self, slot: str, event: Event) -> None:
        if isinstance(event, StageChanged):
            self._stage.labels(slot).state(event.to_stage.value)
        if isinstance(event, (SeedCommitted, SeedPruned)):
            self._forget_seed(slot)
            return
        for name, value in slot_values(event).items():
            if name in self._of_a_seed:
                self._of_a_seed[name].labels(slot).set(value)

    def _forget_seed(self, slot: str) -> None:
        for gauge in self._of_a_seed.values():
            with suppress(KeyError):  # old clients raise where it was never set
                gauge.remove(slot)

    def _go_back(self, to_step: int) -> None:
        """Serve of each slot what was told of it up to a step."""
        for slot, told in self._told.items():
            undone = [record.event for record in told if record.step > to_step]
            stages = [event.from_stage for event in undone if isinstance(event, StageChanged)]
            for stage in stages[:1]:
                self._stage.labels(slot).state(stage.value)
            if undone:
                self._forget_seed(slot)
                while told and told[-1].step > to_step:
                    told.pop()
                for record in told:
                    self._follow(slot, record.event)

    def _gauge(self, name: str) -> "Gauge":
        """Return the gauge of a measured value."""
        if name not in self._measured:
            plain = _REFUSED_CHARACTERS.sub("_", name)
            self._measured[name] = self._new_gauge(name, plain)
        return self._measured[name]

    def _new_gauge(self, name: str, plain: str) -> "Gauge":
        """Make a gauge; one whose name is taken, as several are one to Prometheus, gets another."""
        numbered = (f"esper_measured_{plain}_{number}" for number in itertools.count(2))
        for free in itertools.chain((f"esper_{plain}", f"esper_measured_{plain}"), numbered):
            with suppress(ValueError):
                return self._client.Gauge(free, f"{name}, newest.", registry=self._registry)
        raise AssertionError


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
