"""How a run shows itself while it goes on: live, as lines, as JSON, or not at all."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.lifecycle.actions import SlotState
from esper.lifecycle.events import EventRecord, Priority
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.lifecycle.words import notable, percent
from esper.slots.slot_set import SlotSet
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

_BAR_CELLS = 10
_EVENT_LINES = 5


class RunView(Protocol):
    """Shows epochs; a sink for events, and a context for the time the run takes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

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


def _told(text: str, about: str | None) -> str:
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
    """One line per epoch and one per notable event, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Print the epoch."""
        states = "  ".join(_slot_words(slot.state()) for slot in slots.values())
        line = f"epoch {report.epoch}/{report.epochs}  {_metric_words(report)}  {states}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def publish(self, record: EventRecord) -> None:
        """Print the event if it is notable."""
        words = notable(record)
        if words is not None:
            self._console.print(f"  {words}", markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str, *, about: str | None = None) -> None:
        """Print the note."""
        self._console.print(_told(text, about), markup=False, highlight=False, soft_wrap=True)


class JsonView(QuietView):
    """One JSON object per line: epochs and all events."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Print the epoch."""
        self._print(
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
            }
        )

    def publish(self, record: EventRecord) -> None:
        """Print the event."""
        self._print({"kind": "event", **record.model_dump(mode="json")})

    def note(self, text: str, *, about: str | None = None) -> None:
        """Print the note."""
        self._print({"kind": "note", "text": text})

    def _print(self, document: dict[str, Any]) -> None:
        self._console.out(json.dumps(document), highlight=False)


class LiveView(QuietView):
    """A live table of epoch, metrics, slots and the last events; needs a terminal."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._events: deque[Text] = deque(maxlen=_EVENT_LINES)
        self._last: tuple[EpochReport, list[SlotState]] | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Show the epoch."""
        self._last = (report, [slot.state() for slot in slots.values()])

    def publish(self, record: EventRecord) -> None:
        """Show the event if it is notable."""
        words = notable(record)
        if words is not None:
            style = {Priority.CRITICAL: "bold red", Priority.WARNING: "yellow"}
            self._events.append(Text(words, style=style.get(record.event.priority, "")))

    def note(self, text: str, *, about: str | None = None) -> None:
        """Print the note above the table, where it stays."""
        self._live.console.print(Text(_told(text, about)))

    def _render(self) -> Group:
        if self._last is None:
            return Group(Text(f"{self._title}: first epoch under way", style="bold"))
        report, slots = self._last
        head = Text.assemble(
            (self._title, "bold"),
            f"  epoch {report.epoch}/{report.epochs}  ",
            _metric_words(report),
        )
        bar = Table.grid(expand=True)  # a bare ProgressBar does not end its line
        bar.add_row(ProgressBar(total=report.epochs, completed=report.epoch))
        if self._live.console.width < WIDE_COLUMNS:
            return Group(head, bar, *(Text(_slot_words(slot)) for slot in slots), *self._events)
        return Group(head, bar, _slots_table(slots), *self._events)


def _metric_words(report: EpochReport) -> str:
    values = {"train": report.train_loss, **report.metrics}
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def _slots_table(slots: Sequence[SlotState]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("slot", "stage", "seed", "alpha", "saves", "grown"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    for slot in slots:
        living = slot.stage in LIVING_STAGES
        table.add_row(
            slot.path,
            Text(slot.stage.name, style=STAGE_STYLES[slot.stage]),
            (slot.blueprint or "") if living else "",
            _alpha_bar(slot) if living else "",
            percent(slot.contribution_fraction) if living else "",
            str(slot.committed) if slot.committed else "",
        )
    return table


def _slot_words(slot: SlotState) -> str:
    seed = f" {slot.blueprint} alpha {slot.alpha:.2f}" if slot.stage in LIVING_STAGES else ""
    grown = f" +{slot.committed}" if slot.committed else ""
    return f"[{slot.path} {slot.stage.name}{seed}{grown}]"


def _alpha_bar(slot: SlotState) -> Text:
    filled = round(slot.alpha * _BAR_CELLS)
    bar = "█" * filled + "░" * (_BAR_CELLS - filled)
    return Text(f"{bar} {slot.alpha:.2f}", style=STAGE_STYLES[slot.stage])
