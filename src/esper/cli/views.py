"""How a run shows itself while it goes on: as lines, as JSON, or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console

from esper.cli.printing import print_json_line
from esper.experiments.run import GrowingRun
from esper.lifecycle.events import EventRecord
from esper.lifecycle.notable import notable
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.telemetry.progress import Unit
from esper.training.trainer import EpochReport

STAGE_STYLES = {
    SeedStage.DORMANT: "dim",
    SeedStage.GERMINATED: "white",
    SeedStage.TRAINING: "yellow",
    SeedStage.BLENDING: "dark_orange",
    SeedStage.SHADOWING: "medium_purple",
    SeedStage.PROBATIONARY: "dodger_blue1",
    SeedStage.FOSSILIZED: "green",
    SeedStage.PRUNED: "red",
    SeedStage.EMBARGOED: "red",
    SeedStage.RESETTING: "red",
    SeedStage.TERMINATED: "dim green",
}
WIDE_COLUMNS = 80
"""Below this width tables become lines that can wrap."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """How a slot stands, as cheap to take as it is to look at; never waits for the device."""

    path: str
    stage: SeedStage
    blueprint: str | None
    alpha: float
    contribution_fraction: float | None
    committed: int

    @classmethod
    def of(cls, slot: SeedSlot) -> Self:
        """Look at a slot, from whatever thread."""
        seed = slot.living
        return cls(
            path=slot.path,
            stage=slot.stage,
            blueprint=None if seed is None else seed.blueprint,
            alpha=slot.alpha,
            contribution_fraction=slot.measurements.contribution_fraction,
            committed=slot.num_committed,
        )


class RunView(Protocol):
    """Shows epochs; a sink for events, and a context for the time the run takes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def follow(self, run: GrowingRun) -> None:
        """Know which run it is that begins."""

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Show a finished epoch."""

    def publish(self, record: EventRecord) -> None:
        """Take an event."""

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Take metrics; epochs show them."""

    def flush(self) -> None:
        """Nothing is kept back."""

    def note(self, text: str, *, about: str | None = None) -> None:
        """Show what a person should know."""


def told(text: str, about: str | None) -> str:
    """Return a note with what it is about."""
    return text if about is None else f"{about}: {text}"


class QuietView:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def follow(self, run: GrowingRun) -> None:
        """Show nothing."""

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Show nothing."""

    def publish(self, record: EventRecord) -> None:
        """Show nothing."""

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def flush(self) -> None:
        """Nothing is kept back."""

    def note(self, text: str, *, about: str | None = None) -> None:
        """Show nothing; the run folder has it."""


class LinesView(QuietView):
    """One line per epoch and one per notable event, for pipes and logs.

    Args:
        console: To print to.
        unit: What the events' epochs count.
    """

    def __init__(self, console: Console, *, unit: Unit) -> None:
        self._console = console
        self._unit = unit

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Print the epoch."""
        states = "  ".join(slot_words(Glance.of(slot)) for slot in slots.values())
        line = f"epoch {report.epoch}/{report.epochs}  {metric_words(report)}  {states}"
        self._console.print(line, soft_wrap=True)

    def publish(self, record: EventRecord) -> None:
        """Print the event if it is notable."""
        words = notable(record, self._unit)
        if words is not None:
            self._console.print(f"  {words}", soft_wrap=True)

    def note(self, text: str, *, about: str | None = None) -> None:
        """Print the note."""
        self._console.print(told(text, about), soft_wrap=True)


class JsonView(QuietView):
    """One JSON object per line: epochs and all events."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Print the epoch."""
        print_json_line(
            self._console,
            {
                "kind": "epoch",
                "epoch": report.epoch,
                "epochs": report.epochs,
                "step": report.step,
                "train_loss": report.train_loss,
                "metrics": report.metrics,
                "slots": [
                    {"path": path, "stage": slot.stage.value, "alpha": slot.alpha}
                    for path, slot in slots.items()
                ],
            },
        )

    def publish(self, record: EventRecord) -> None:
        """Print the event."""
        print_json_line(self._console, {"kind": "event", **record.model_dump(mode="json")})

    def note(self, text: str, *, about: str | None = None) -> None:
        """Print the note."""
        print_json_line(self._console, {"kind": "note", "text": text})


def metric_words(report: EpochReport) -> str:
    """Return the epoch's losses and metrics in a line."""
    values = {"train": report.train_loss, **report.metrics}
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def slot_words(slot: Glance) -> str:
    """Return how a slot stands in a few characters."""
    seed = f" {slot.blueprint} alpha {slot.alpha:.2f}" if slot.stage in LIVING_STAGES else ""
    grown = f", {slot.committed} committed" if slot.committed else ""
    return f"[{slot.path} {slot.stage.name}{seed}{grown}]"
