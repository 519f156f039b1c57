"""A run as it goes on, in a terminal: where it stands, what its slots hold, what just happened."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.cli.views import (
    STAGE_STYLES,
    WIDE_COLUMNS,
    Glance,
    QuietView,
    metric_words,
    slot_words,
    told,
)
from esper.experiments.run import GrowingRun
from esper.lifecycle.events import EventRecord, Priority
from esper.lifecycle.notable import notable
from esper.lifecycle.stages import LIVING_STAGES
from esper.lifecycle.words import percent
from esper.report.run_page import duration
from esper.slots.slot_set import SlotSet
from esper.telemetry.progress import Unit
from esper.training.trainer import EpochReport

_BAR_CELLS = 10
_EVENT_LINES = 5
_SPEED_SAMPLES = 40
"""Of steps over time, one per picture: 5 seconds."""


class LiveView(QuietView):
    """A live table of step, speed, metrics, slots and the last events; needs a terminal.

    It looks at the run from a thread of its own, so that a step costs nothing more.

    Args:
        console: To draw on.
        title: Of the run.
        unit: What its events' epochs count.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        unit: Unit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._unit = unit
        self._clock = clock
        self._events: deque[Text] = deque(maxlen=_EVENT_LINES)
        self._last: EpochReport | None = None
        self._run: GrowingRun | None = None
        self._steps: deque[tuple[float, int]] = deque(maxlen=_SPEED_SAMPLES)
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

    def follow(self, run: GrowingRun) -> None:
        """Show the run's steps from now on."""
        self._run = run

    def epoch(self, report: EpochReport, slots: SlotSet) -> None:
        """Show the epoch's metrics."""
        self._last = report

    def publish(self, record: EventRecord) -> None:
        """Show the event if it is notable."""
        words = notable(record, self._unit)
        if words is not None:
            style = {Priority.CRITICAL: "bold red", Priority.WARNING: "yellow"}
            self._events.append(Text(words, style=style.get(record.event.priority, "")))

    def note(self, text: str, *, about: str | None = None) -> None:
        """Print the note above the table, where it stays."""
        self._live.console.print(Text(told(text, about)))

    def _render(self) -> Group:
        run, report = self._run, self._last
        if run is None:
            return Group(Text(f"{self._title}: not begun", style="bold"))
        step, total = run.growth.step, run.total_steps
        epoch = min(run.trainer.epoch + 1, run.trainer.config.epochs)
        head = Text.assemble(
            (self._title, "bold"),
            f"  epoch {epoch}/{run.trainer.config.epochs}  step {step:,}/{total:,}",
            (self._speed(step, total), "dim"),
        )
        bar = Table.grid(expand=True)  # a bare ProgressBar does not end its line
        bar.add_row(ProgressBar(total=total, completed=min(step, total)))
        metrics = Text("first epoch under way" if report is None else metric_words(report))
        slots = [Glance.of(slot) for slot in run.growth.slots.values()]
        if self._live.console.width < WIDE_COLUMNS:
            lines = [Text(slot_words(slot)) for slot in slots]
            return Group(head, bar, metrics, *lines, *self._events)
        return Group(head, bar, metrics, _slots_table(slots), *self._events)

    def _speed(self, step: int, total: int) -> str:
        """Return steps per second and the time left, of the last few seconds."""
        now = self._clock()
        if self._steps and step < self._steps[-1][1]:  # the run went back
            self._steps.clear()
        self._steps.append((now, step))
        since, first = self._steps[0]
        if step == first or now == since:
            return ""
        speed = (step - first) / (now - since)
        left = f", {duration((total - step) / speed)} left" if step < total else ""
        return f"  {speed:.3g} steps/s{left}"


def _slots_table(slots: Sequence[Glance]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("slot", "stage", "seed", "alpha", "saves ≥", "grown"):
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


def _alpha_bar(slot: Glance) -> Text:
    filled = round(slot.alpha * _BAR_CELLS)
    bar = "█" * filled + "░" * (_BAR_CELLS - filled)
    return Text(f"{bar} {slot.alpha:.2f}", style=STAGE_STYLES[slot.stage])
