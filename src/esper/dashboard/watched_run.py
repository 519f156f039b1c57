"""One run in the list, kept up to date at the price of two file times while nothing happens."""

import math
import os
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esper.dashboard.trend import Trend
from esper.lifecycle.events import EventSchemaError
from esper.telemetry.run_store import (
    CONFIG_FILE,
    DATABASE_FILE,
    RunFolderError,
    RunReader,
    is_written,
)

CANNOT_READ = (RunFolderError, EventSchemaError, OSError, sqlite3.Error, TypeError, ValueError)
"""What reading a run folder raises that is damaged, half written, or gone."""

_Marks = tuple[tuple[int, int, int], ...]
_ABSENT = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """What the list shows of a run.

    Attributes:
        status: "running", "finished", "failed", "interrupted"; "killed" if nobody writes a run that
            is not over; "starting" while its folder is being made, "unreadable" if it cannot be
            read, for which `problem` says why.
        loss: Held out, the last; `trend` is all of it in few points.
    """

    id: str
    status: str = "starting"
    problem: str | None = None
    task: str = ""
    policy: str = ""
    random_seed: int | None = None
    attempt: int = 0
    epoch: int = 0
    epochs: int | None = None
    step: int = 0
    loss: float | None = None
    best_loss: float | None = None
    trend: list[float] = field(default_factory=list)
    growing: int = 0
    committed: int = 0
    pruned: int = 0
    events: int = 0
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
        self.row = RunRow(id=run_id)
        # As text: hundreds of runs are looked at several times a second.
        self._marked = (str(folder / DATABASE_FILE), str(folder / f"{DATABASE_FILE}-wal"))
        self._seen: _Marks | None = None
        self._settled = False
        self._begin()

    def _begin(self) -> None:
        self._attempt = 0
        self._config: Mapping[str, Any] = {}
        self._trend = Trend()
        self._best: float | None = None
        self._last: float | None = None
        self._last_metric = 0

    def look(self) -> bool:
        """Bring the row up to date; return whether it has changed."""
        before = self.row
        marks = _marks(self._marked)
        if marks[0] == _ABSENT:
            return False  # the next search will say so
        if marks != self._seen:
            self._seen, self._settled = marks, False
        elif not self._settled:
            self._settled = True  # two commits may share one file time: read once more
        elif before.status != "starting" and not self._may_have_been_killed():
            return False
        self.row = self._read()
        return self.row != before

    def _may_have_been_killed(self) -> bool:
        return self.row.status == "running" and not is_written(self.folder)

    def _read(self) -> RunRow:
        try:
            return self._read_row(RunReader(self.folder))
        except CANNOT_READ as error:
            is_made = is_written(self.folder)
            return replace(
                self.row,
                status="starting" if is_made else "unreadable",
                problem=None if is_made else str(error),
            )

    def _read_row(self, reader: RunReader) -> RunRow:
        has_writer = is_written(self.folder)
        glance = reader.glance()  # after the question who writes: a run that ends says so first
        if glance.attempt != self._attempt:
            self._begin()
            self._attempt, self._config = glance.attempt, reader.config()
        for value in reader.metrics(after=self._last_metric, name="loss"):
            self._trend.take(value.value)
            self._last_metric, self._last = value.id, value.value
            if math.isfinite(value.value):
                self._best = min(value.value, math.inf if self._best is None else self._best)
        counts = glance.event_counts
        committed, pruned = counts.get("seed_committed", 0), counts.get("seed_pruned", 0)
        killed = glance.status == "running" and not has_writer and os.name == "posix"
        trainer = self._config.get("trainer")
        return RunRow(
            id=self.row.id,
            status="killed" if killed else glance.status,
            task=str(self._config.get("task", "")),
            policy=str(self._config.get("policy", "")),
            random_seed=self._config.get("random_seed"),
            attempt=glance.attempt,
            epoch=glance.epoch,
            epochs=trainer.get("epochs") if isinstance(trainer, Mapping) else None,
            step=glance.step,
            loss=self._last,
            best_loss=self._best,
            trend=self._trend.points(),
            growing=max(0, counts.get("seed_germinated", 0) - committed - pruned),
            committed=committed,
            pruned=pruned,
            events=sum(counts.values()),
            started_seconds=glance.first_seconds or (self.folder / CONFIG_FILE).stat().st_mtime,
            last_seconds=glance.last_seconds,
        )


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
