"""What is read of living seeds before anything is decided: gradients, losses, isolation."""

import math
from collections.abc import Mapping
from dataclasses import asdict

from esper.lifecycle.events import (
    Event,
    GradientHealthMeasured,
    IsolationChecked,
    IsolationViolated,
)
from esper.lifecycle.stages import SeedStage
from esper.slots.gradient_health import EXPLODING_RATIO, is_lost
from esper.slots.isolation_monitor import IsolationMonitor, IsolationReading
from esper.slots.slot_set import SlotSet

_NAMED_PARAMETERS = 5
"""How many of the parameters that a leak reached an event names."""


class SeedReadings:
    """Reads what steps have left on the device, and writes it into the seeds' measurements.

    Args:
        slots: Whose seeds are read.
        isolation_monitor: Of the same slots.
    """

    def __init__(self, slots: SlotSet, isolation_monitor: IsolationMonitor) -> None:
        self._slots = slots
        self._isolation_monitor = isolation_monitor

    def note_loss(self, loss: float) -> None:
        """Take note of the held-out loss that was just evaluated.

        A seed is compared with the last finite one before it entered the forward path. Where there
        was none, the first one after that stands for it, and is itself compared with nothing.
        """
        for slot in self._slots.values():
            measured = slot.measurements
            if slot.stage is SeedStage.TRAINING and math.isfinite(loss):
                measured.reference_loss = loss
            if measured.reference_loss is not None:
                measured.loss_increase_fraction = _increase(loss, measured.reference_loss)
            elif slot.living is not None and math.isfinite(loss):
                measured.reference_loss = loss

    def read_gradient_health(self) -> list[Event]:
        """Read gradient norms since the last time. Waits for the device."""
        events: list[Event] = []
        for slot in self._slots.values():
            reading = self._slots.read_gradient_health(slot)
            if reading is None:
                continue
            slot.measurements.gradient_ratio = reading.ratio
            events.append(
                GradientHealthMeasured(
                    slot=slot.path,
                    host_norm=reading.host_norm,
                    seed_norm=reading.seed_norm,
                    ratio=reading.ratio,
                    nonfinite_steps=int(slot.nonfinite_steps),
                    vanishing=reading.vanishing,
                    exploding=reading.exploding,
                )
            )
        return events

    def broken_behind_the_host(self) -> Mapping[str, str]:
        """Return why seeds behind the host are to be pruned whose own gradients have broken them.

        By slot, and the same in all processes that train one model. The host never felt them.
        """
        replication = self._slots.replication
        broken: dict[str, str] = {}
        for path, slot in self._slots.items():
            if slot.stage is not SeedStage.TRAINING:
                continue
            ratio, nonfinite = slot.measurements.gradient_ratio, int(slot.nonfinite_steps)
            if replication is not None:  # each counts what arrives in it
                nonfinite = replication.largest(nonfinite)
            if is_lost(nonfinite, steps=slot.measurements.training_steps):
                broken[path] = "its gradients are not finite"
            elif ratio is not None and ratio > EXPLODING_RATIO:
                broken[path] = "its gradients explode"
        return broken if replication is None else replication.from_first(broken)

    def read_isolation(self) -> list[Event]:
        """Read what the isolation monitor has found since the last time. Waits for the device."""
        events: list[Event] = []
        for reading in self._isolation_monitor.read():
            if reading.seed_lives:
                measurements = self._slots[reading.slot].measurements
                known = measurements.isolation_leaks or 0
                measurements.isolation_leaks = known + reading.violations
            events += _told_of_isolation(reading)
        return events

    def share(self) -> None:
        """Let the gates of every process judge what the first one has measured."""
        replication = self._slots.replication
        if replication is None:
            return
        mine = {path: asdict(slot.measurements) for path, slot in self._slots.items()}
        for path, measured in replication.from_first(mine).items():
            for name, value in measured.items():
                setattr(self._slots[path].measurements, name, value)


def _increase(loss: float, reference: float) -> float:
    """Return the share of a reference's size that a loss has risen by; infinite if that is 0."""
    if loss == reference:
        return 0.0
    return (loss - reference) / abs(reference) if reference else math.copysign(math.inf, loss)


def _told_of_isolation(reading: IsolationReading) -> list[Event]:
    checked = IsolationChecked(
        slot=reading.slot,
        blueprint=reading.blueprint,
        checks=reading.checks,
        violations=reading.violations,
        without_verdict=reading.without_verdict,
    )
    if not reading.violations:
        return [checked]
    violated = IsolationViolated(
        slot=reading.slot,
        blueprint=reading.blueprint,
        reached=dict(list(reading.reached.items())[:_NAMED_PARAMETERS]),
        num_reached=len(reading.reached),
    )
    return [checked, violated]
