"""One run in the list, kept up to date at the price of two file times while nothing happens."""

import logging
import math
import os
import shlex
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from esper.dashboard.run_folders import as_text
from esper.dashboard.seed_story import seed_story
from esper.dashboard.trend import Trend
from esper.lifecycle.events import EventSchemaError
from esper.report.training_story import RETURN, TRAINING_WORDS, planned_steps
from esper.telemetry.progress import progress_of, whole_number
from esper.telemetry.run_folder import CONFIG_FILE, DATABASE_FILE, RunFolderError, is_written
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_reader import RunReader, standing

CANNOT_READ = (RunFolderError, EventSchemaError, OSError, sqlite3.Error)
"""What reading a run folder raises that is damaged, half written, or gone."""
_LOOKS_BETWEEN_TRIES = 5
_SETTINGS_OF_GROW = frozenset({"task", "policy", "random_seed", "trainer"})

_LOG = logging.getLogger(__name__)
_Marks = tuple[tuple[int, int, int], ...]
_ABSENT = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """What the list shows of a run.

    Attributes:
        status: "running", "finished", "failed", "interrupted", "stopped"; "killed" if nobody writes
            a run that is not over and no mirror; "starting" while its folder is being made,
            "unreadable" if it cannot be read, for which `problem` says why.
        kind: A training is that of a policy; it has no loss and no seeds of its own.
        resume: The command that resumes the run; "" of a mirror, whose run is resumed where it ran,
            and of a run in somebody's own loop, which only that loop can go on with.
        unit: What `epoch` counts; `epochs` is how many there will be, if that is known.
        loss: Held out, the last; `trend` is all of it in few points.
        mean_return: Of episodes, the last; `trend` is that of a training.
        last_value: Row of the last value of any name, so that one more makes another row of this.
    """

    id: str
    status: str = "starting"
    problem: str | None = None
    kind: Literal["run", "training"] = "run"
    resume: str = ""
    task: str = ""
    policy: str = ""
    random_seed: int | None = None
    attempt: int = 0
    unit: Literal["epoch", "decision", "rollout"] = "epoch"
    epoch: int = 0
    epochs: int | None = None
    step: int = 0
    loss: float | None = None
    best_loss: float | None = None
    mean_return: float | None = None
    trend: list[float] = field(default_factory=list)
    growing: int = 0
    committed: int = 0
    pruned: int = 0
    events: int = 0
    last_value: int = 0
    started_seconds: float = 0.0
    last_seconds: float | None = None


class WatchedRun:
    """Keeps the row of one run.

    Args:
        run_id: Shown in the row.
        folder: Of the run.
    """

    def __init__(self, run_id: str, folder: Path) -> None:
        self.folder = folder
        self._named = shlex.quote(as_text(str(folder)))
        self.row = RunRow(id=run_id)
        # As text: hundreds of runs are looked at several times a second.
        self._marked = (str(folder / DATABASE_FILE), str(folder / f"{DATABASE_FILE}-wal"))
        self._seen: _Marks | None = None
        self._settled = False
        self._looks = 0
        self._begin()

    def _begin(self) -> None:
        self._life: tuple[str, int, float | None] | None = None
        self._is_mirror = False
        self._config: Mapping[str, Any] = {}
        self._training: Mapping[str, Any] | None = None
        self._total_steps: int | None = None
        self._trend = Trend()
        self._best: float | None = None
        self._last: float | None = None
        self._last_followed = 0
        self._last_value = 0

    def look(self) -> bool:
        """Bring the row up to date; return whether it has changed.

        Whatever reading raises is the row's problem, and no other run's.
        """
        before = self.row
        self._looks += 1
        marks = _marks(self._marked)
        if marks[0] == _ABSENT:
            return False  # the next search will say so
        if marks != self._seen:
            self._seen, self._settled = marks, False
        elif not self._settled:
            self._settled = True  # two commits may share one file time: read once more
        elif not self._may_read_otherwise():
            return False
        self.row = self._read()
        return self.row != before

    def _may_read_otherwise(self) -> bool:
        """Return whether a run whose database is as it was may have to be shown otherwise."""
        if self.row.status == "starting":
            return True
        if self.row.status == "unreadable":  # a file may come, or be ours to read, later
            return self._looks % _LOOKS_BETWEEN_TRIES == 0
        return self.row.status == "running" and not (self._is_mirror or self._is_written())

    def _is_written(self) -> bool:
        """Return whether somebody writes the run, as far as can be known."""
        try:
            return is_written(self.folder)
        except OSError:
            return False

    def _read(self) -> RunRow:
        try:
            return self._read_row(RunReader(self.folder))
        except CANNOT_READ as error:
            if self._is_written():
                return replace(self.row, status="starting", problem=None)
            return self._unreadable(str(error))
        except Exception as error:  # noqa: BLE001 – whatever one run raises, others are read
            problem = f"{type(error).__name__}: {error}"
            if problem != self.row.problem:
                _LOG.error("%s cannot be read", self.folder, exc_info=error)
            return self._unreadable(problem)

    def _unreadable(self, problem: str) -> RunRow:
        return replace(self.row, status="unreadable", problem=as_text(problem))

    def _read_row(self, reader: RunReader) -> RunRow:
        has_writer = is_written(self.folder)
        glance = reader.glance()  # after the question who writes: a run that ends says so first
        life = (reader.run_id, glance.attempt, glance.first_seconds)  # a folder may be made anew
        if life != self._life:
            self._begin()
            self._config, self._life = reader.config(), life
            self._training = training_settings(self._config)
        self._is_mirror = glance.is_mirror
        self._follow(reader)
        counts = glance.event_counts
        germinated, committed, pruned = _seeds(reader, counts)
        progress = progress_of(self._config)
        row = RunRow(
            id=self.row.id,
            resume=f"esper resume {self._named}" if self._can_be_resumed() else "",
            status=standing(glance.status, has_writer=has_writer, is_mirror=glance.is_mirror),
            task=str(self._config.get("task", "")),
            policy=str(self._config.get("policy", "")),
            random_seed=whole_number(self._config.get("random_seed")),
            attempt=glance.attempt,
            unit=progress.unit,
            epoch=glance.epoch,
            epochs=progress.total,
            step=glance.step,
            loss=self._last,
            best_loss=self._best,
            trend=self._trend.points(),
            growing=max(0, germinated - committed - pruned),
            committed=committed,
            pruned=pruned,
            events=sum(counts.values()),
            last_value=self._last_value,
            started_seconds=glance.first_seconds or (self.folder / CONFIG_FILE).stat().st_mtime,
            last_seconds=glance.last_seconds,
        )
        return row if self._training is None else self._of_training(row)

    def _can_be_resumed(self) -> bool:
        """Return whether `esper grow` made the run, here: its settings are that command's."""
        return not self._is_mirror and self._config.keys() >= _SETTINGS_OF_GROW

    def _follow(self, reader: RunReader) -> None:
        """Read on in the values."""
        if self._training is not None:
            for value in reader.metrics(after=self._last_value, name="total_steps"):
                self._total_steps = round(value.value)
        name = "loss" if self._training is None else RETURN
        for value in reader.metrics(after=self._last_followed, name=name):
            self._trend.take(value.value)
            self._last_followed, self._last = value.id, value.value
            if math.isfinite(value.value):
                self._best = min(value.value, math.inf if self._best is None else self._best)
        self._last_value = reader.last_metric_id()

    def _of_training(self, row: RunRow) -> RunRow:
        """Return the row of a training, whose only events are mishaps: times are not theirs."""
        return replace(
            row,
            kind="training",
            resume=f"esper policy train --out {self._named}",
            policy=TRAINING_WORDS,
            unit="decision",
            epoch=row.step,
            epochs=planned_steps(self._training or {}, asked=self._total_steps),
            loss=None,
            best_loss=None,
            mean_return=self._last,
            started_seconds=(self.folder / CONFIG_FILE).stat().st_mtime,
            last_seconds=None,
        )


def _seeds(reader: RunReader, counts: Mapping[str, int]) -> tuple[int, int, int]:
    """Return how many seeds a run has germinated, committed and pruned."""
    if not counts.get("run_went_back", 0):
        germinated, committed, pruned = "seed_germinated", "seed_committed", "seed_pruned"
        return counts.get(germinated, 0), counts.get(committed, 0), counts.get(pruned, 0)
    ended = [seed.outcome for seed in seed_story(reader).seeds]
    return len(ended), ended.count("committed"), ended.count("pruned")


def _marks(paths: Iterable[str]) -> _Marks:
    """Return what differs once a file has been written."""
    marks = []
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116
        except OSError:
            marks.append(_ABSENT)
        else:
            marks.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return tuple(marks)
