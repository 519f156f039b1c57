"""The story of one run, or of one training, told on as its rows come in."""

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.dashboard.run_folders import as_text
from esper.lifecycle.events import EventRecord, Priority, RunFinished, RunStarted
from esper.lifecycle.notable import in_words
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.report.chart import STAGE_COLOURS, Chart
from esper.report.charts import run_charts
from esper.report.story import SeedStory, StoryTeller
from esper.report.training_charts import training_charts
from esper.report.training_page import training_figures
from esper.report.training_story import TrainingStory
from esper.telemetry.progress import Unit, progress_of
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_reader import MetricRow, RunGlance, RunReader

CHUNK_EVENTS = 2000
CHUNK_VALUES = 20_000
"""Read at a time, so that others get a turn: 20 to 40 ms."""
_MAX_LINES = 200


@dataclass(frozen=True, kw_only=True)
class EventLine:
    """An event that a person watching wants to know, in words."""

    id: int
    time_seconds: float
    epoch: int
    step: int
    priority: Priority
    type: str
    words: str


@dataclass(frozen=True, kw_only=True)
class SlotNow:
    """A slot as it stands.

    Attributes:
        alpha, param_count, contribution_fraction, gradient_ratio: Of the living seed, else None.
        colour: Of the stage; None if none is alive in the slot or just has been.
        since_epoch: When the stage was entered.
        refused: What its last gate held against it, if that was in this stage.
        committed: Blueprints that the host has taken over here, oldest first.
    """

    path: str
    stage: SeedStage
    colour: str | None
    since_epoch: int
    blueprint: str | None
    alpha: float | None
    param_count: int | None
    contribution_fraction: float | None
    gradient_ratio: float | None
    refused: str | None
    committed: list[str]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a run that a person asks for first.

    Attributes:
        host_params: None if the run did not tell them, as one in somebody's own loop.
        params: Of the network as it stands, living seeds included; None if that is not known.
        metrics: The last of each that was measured.
        test_metrics: Once the run has finished.
        seconds: That the run went on, as `RunStory` has it.
    """

    host_params: int | None
    params: int | None
    epoch: int
    step: int
    seconds: float | None
    metrics: dict[str, float]
    test_metrics: dict[str, float] | None
    twin_metrics: dict[str, float] | None
    interventions: int
    growing: int
    committed: int
    pruned: int


@dataclass(frozen=True, kw_only=True)
class TailState:
    """All that is shown of a run but its charts.

    Attributes:
        version: Differs when anything does; the charts belong to it.
        telling: Differs when the story was begun anew, since rows that were read may be gone.
        unread: Events that are there and not yet told.
        unit: What the epoch of a line or a slot counts.
        figures: None of the training of a policy.
        training_figures: Of a training, each with its name and a remark; of a run, none.
        lines: The last ones after those that were seen.
    """

    version: str
    telling: str
    unread: int
    unit: Unit
    config: Mapping[str, Any]
    figures: Figures | None
    training_figures: list[tuple[str, str, str]]
    slots: list[SlotNow]
    lines: list[EventLine]


class RunTail:
    """Reads on in one run's events and metrics, and tells what they come to.

    May be used by several threads, each of which waits for the others.

    Args:
        folder: Of the run.

    Raises:
        RunFolderError: It is no run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = RunReader(folder)
        self._lock = threading.Lock()
        self._begin(self._life_of(self._reader.glance()))

    def _begin(self, life: tuple[str, int, float | None]) -> None:
        self._config = self._reader.config()  # first: where it cannot be read, nothing has begun
        self._life = life
        settings = training_settings(self._config)
        self._training = None if settings is None else TrainingStory(settings=settings)
        self._teller = StoryTeller(progress_of(self._config).unit)
        self._lines: deque[EventLine] = deque(maxlen=_MAX_LINES)
        self._metrics: list[MetricRow] = []
        self._last_values: dict[str, float] = {}
        self._last_event = 0
        self._last_metric = 0
        self._num_events = 0
        self._unread = 0
        self._charts: tuple[str, list[Chart]] | None = None

    @property
    def num_rows(self) -> int:
        """How many events and values are kept in mind: what the tail costs in memory."""
        return self._num_events + len(self._metrics)

    def advance(self) -> bool:
        """Read on, at most `CHUNK_EVENTS` and `CHUNK_VALUES`; return whether there may be more.

        A run that was resumed, or removed and made anew under its name, is read from its beginning:
        rows that were read may be gone.

        Raises:
            RunFolderError: The folder is gone.
            EventSchemaError: An event was written by another version.
        """
        with self._lock:
            glance = self._reader.glance()
            if self._life_of(glance) != self._life:
                self._begin(self._life_of(glance))
            rows = self._reader.event_rows(after=self._last_event, limit=CHUNK_EVENTS)
            for row in rows:
                self._take(row.id, row.record)
            self._num_events += len(rows)
            self._unread = max(0, sum(glance.event_counts.values()) - self._num_events)
            if len(rows) == CHUNK_EVENTS:
                return True
            values = self._reader.metrics(after=self._last_metric, limit=CHUNK_VALUES)
            if values:
                self._metrics += values
                if self._training is not None:
                    self._training.take_values(values)
                self._last_values.update((row.name, row.value) for row in values)
                self._last_metric = values[-1].id
            self._unread = 0
            return len(values) == CHUNK_VALUES

    def _take(self, row: int, record: EventRecord) -> None:
        event = record.event
        self._teller.take(record)
        if self._training is not None:
            self._training.take(record)
        self._last_event = row
        words = _words(record)
        if words is not None:
            line = EventLine(
                id=row,
                time_seconds=record.time_seconds,
                epoch=record.epoch,
                step=record.step,
                priority=event.priority,
                type=event.type,
                words=words,
            )
            self._lines.append(line)

    def state(self, *, after: int = 0) -> TailState:
        """Return what is known by now.

        Args:
            after: The last line that was seen; 0 returns all that are kept.
        """
        with self._lock:
            return TailState(
                version=self._version,
                telling=self._telling,
                unread=self._unread,
                unit=self._teller.story.unit,
                config=self._config,
                figures=self._figures() if self._training is None else None,
                training_figures=(
                    [] if self._training is None else training_figures(self._training)
                ),
                slots=self._slots(),
                lines=[line for line in self._lines if line.id > after],
            )

    def charts(self) -> tuple[str, list[Chart]]:
        """Return the charts, and the version that they show."""
        with self._lock:
            if self._charts is None or self._charts[0] != self._version:
                if self._training is not None:
                    charts = training_charts(self._training)
                else:
                    charts = run_charts(self._teller.story, self._metrics)
                self._charts = (self._version, charts)
            return self._charts

    def _life_of(self, glance: RunGlance) -> tuple[str, int, float | None]:
        """Return what differs once rows that were read may be gone."""
        return as_text(self._reader.run_id), glance.attempt, glance.first_seconds

    @property
    def _telling(self) -> str:
        run_id, attempt, first_seconds = self._life
        return f"{run_id}.{attempt}.{first_seconds}"

    @property
    def _version(self) -> str:
        return f"{self._telling}.{self._last_event}.{self._last_metric}"

    def _figures(self) -> Figures:
        story = self._teller.story
        ended = [seed.outcome for seed in story.seeds]
        last = self._metrics[-1] if self._metrics else None
        finished, twin = story.finished, story.twin
        counts = [count for _, count in story.param_counts[-1:]]
        if finished is not None:
            counts = [finished.param_count]
        return Figures(
            host_params=story.host_param_count,
            params=counts[0] if counts else None,
            epoch=last.epoch if last is not None else 0,
            step=max(story.last_step, last.step if last is not None else 0),
            seconds=story.seconds if math.isfinite(story.seconds or 0.0) else None,
            metrics=dict(self._last_values),
            test_metrics=finished.metrics if finished is not None else None,
            twin_metrics=twin.metrics if twin is not None else None,
            interventions=len(story.interventions),
            growing=ended.count("still growing"),
            committed=ended.count("committed"),
            pruned=ended.count("pruned"),
        )

    def _slots(self) -> list[SlotNow]:
        story = self._teller.story
        seeds: dict[str, list[SeedStory]] = {path: [] for path in story.slots}
        for seed in story.seeds:
            seeds.setdefault(seed.slot, []).append(seed)
        return [self._slot(path, lives) for path, lives in seeds.items()]

    def _slot(self, path: str, lives: Sequence[SeedStory]) -> SlotNow:
        changed = self._teller.story.stages.get(path)
        stage, epoch = (SeedStage.DORMANT, 0) if changed is None else (changed.stage, changed.epoch)
        seed = lives[-1] if lives and stage in LIVING_STAGES else None
        step = self._teller.story.last_step
        if self._metrics:
            step = max(step, self._metrics[-1].step)
        return SlotNow(
            path=path,
            stage=stage,
            colour=STAGE_COLOURS.get(stage),
            since_epoch=epoch,
            blueprint=None if seed is None else seed.blueprint,
            alpha=None if seed is None else _alpha(seed, step),
            param_count=None if seed is None else seed.param_count,
            contribution_fraction=None if seed is None else seed.contribution_fraction,
            gradient_ratio=(
                seed.gradient_ratios[-1].ratio
                if seed is not None and seed.gradient_ratios
                else None
            ),
            refused=None if seed is None else _refused(seed, epoch),
            committed=[life.blueprint for life in lives if life.committed],
        )


def _alpha(seed: SeedStory, step: int) -> float:
    points = seed.alpha_points(step)
    return points[-1][1] if points else 0.0


def _refused(seed: SeedStory, since_epoch: int) -> str | None:
    visit = seed.gates[-1] if seed.gates else None
    if visit is None or visit.event.result.passed or visit.epoch < since_epoch:
        return None
    return seed.reason


def _words(record: EventRecord) -> str | None:
    """Return an event in words, if it is notable or urgent."""
    event = record.event
    words = in_words(record)
    if words is not None:
        return words
    if isinstance(event, RunStarted):
        return f"run began: {event.host_param_count:,} parameters, {len(event.slots)} slots"
    if isinstance(event, RunFinished):
        return f"run finished: {event.param_count:,} parameters"
    if event.priority is Priority.NORMAL:
        return None
    slot = getattr(event, "slot", None)
    return event.type.replace("_", " ") + (f" in {slot}" if slot is not None else "")
