"""Events and metrics for Weights & Biases."""

import os
import shlex
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

from esper.lifecycle.events import EventRecord, Priority
from esper.telemetry.run_folder import RunStatus
from esper.telemetry.tracked_values import named_values, told
from esper.telemetry.tracker import Tracker, TrackerError, read_run_id, write_run_id

WandbMode = Literal["offline", "online"]

WANDB_FOLDER = "wandb"
"""What W&B calls the folder that it makes in the one it is given."""

_NEEDS_WANDB = "WandbSink needs Weights & Biases: pip install 'esper-lite[wandb]'"
_COLUMNS = ("epoch", "step", "priority", "type", "text")
_MAX_ROWS = 1000


@final
class WandbSink(Tracker):
    """Logs a W&B run: values by the metric "step", a table of notable events, alerts, the config.

    A CRITICAL event is an alert. W&B's own step only counts calls, since more than one thing
    happens in an optimizer step; charts are drawn over "step".

    Args:
        folder: W&B makes its own, `wandb`, in it; is created.
        project: Where the run belongs.
        mode: "offline" uses no network, and `wandb sync` uploads later; "online" needs an API key.
        name: Of the run; None lets W&B make one up.
        config: What was chosen for the run, as JSON values.
        after_step: Of a run that goes on, the last step that it still knows of: the same W&B run
            goes on. W&B cannot forget what it has been told of later ones, they are told again.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        TrackerError: W&B cannot begin the run.

    Effects: W&B starts a process of its own. Offline its error reports are turned off, which would
    use the network (WANDB_ERROR_REPORTING, unless it is set).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str = "esper",
        mode: WandbMode = "offline",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        after_step: int | None = None,
    ) -> None:
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # noqa: PLC0415 – an optional extra
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_NEEDS_WANDB) from error
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        files = self.folder / WANDB_FOLDER
        known = None if after_step is None else read_run_id(files)
        try:
            self.run = wandb.init(
                project=project,
                id=known,
                resume=None if known is None else "allow",
                name=name,
                dir=self.folder,
                mode=mode,
                config=dict(config or {}),
                reinit="create_new",
                settings=wandb.Settings(silent=mode == "offline", console="off"),
            )
        except Exception as error:
            raise TrackerError(f"W&B cannot begin a run in {files}: {error}") from error
        write_run_id(files, self.run.id)
        self.run.define_metric("*", step_metric="step")
        self._wandb = wandb
        self._online = mode == "online"
        self._rows: deque[tuple[int, int, str, str, str]] = deque(maxlen=_MAX_ROWS)
        self._rows_changed = False

    @property
    def place(self) -> str:
        """The run's address, or the command that uploads it."""
        address = self.run.url if self._online else None  # asked for offline, it warns
        return address or f"wandb sync {shlex.quote(str(Path(self.run.dir).parent))}"

    def publish(self, record: EventRecord) -> None:
        """Log an event's values; a notable one is a row of the table, a CRITICAL one an alert."""
        event = record.event
        self._log(record.epoch, record.step, named_values(event))
        text = told(record)
        if text is not None:
            self._rows.append((record.epoch, record.step, event.priority.value, event.type, text))
            self._rows_changed = True
        if event.priority is Priority.CRITICAL:
            self.run.alert(title=f"esper: {event.type}", text=f"step {record.step}: {text}")

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Log named values; NaN is kept, and left out of W&B's charts."""
        self._log(epoch, step, metrics)

    def flush(self) -> None:
        """Log the table of events if there are new ones; W&B's process writes by itself."""
        if self._rows_changed:
            rows = [list(row) for row in self._rows]
            table = self._wandb.Table(columns=list(_COLUMNS), data=rows)
            _, step, *_ = self._rows[-1]
            self.run.log({"events": table, "step": step})
            self._rows_changed = False

    def close(self, status: RunStatus = "finished") -> None:
        """Finish the run, as crashed unless it is finished; online this waits for the upload."""
        try:
            self.flush()
        finally:
            self.run.finish(exit_code=0 if status in ("finished", "stopped") else 1)

    def _log(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        if values:
            self.run.log({**values, "epoch": epoch, "step": step})
