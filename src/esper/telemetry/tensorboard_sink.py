"""Events and metrics for TensorBoard."""

import shlex
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from esper.lifecycle.events import EventRecord, RunWentBack
from esper.telemetry.run_folder import RunStatus
from esper.telemetry.tracked_values import named_values, told
from esper.telemetry.tracker import Tracker, flat_settings

_NEEDS_TENSORBOARD = "TensorBoardSink needs tensorboard: pip install 'esper-lite[tensorboard]'"
_ALWAYS_MEASURED = ("loss", "train_loss")
"""What the HParams page compares runs by, from the start."""


@final
class TensorBoardSink(Tracker):
    """Writes an event file: scalars by optimizer step, notable events as text, hyperparameters.

    It writes in the caller's thread, so that a full disk is an error of the call that meets it;
    what is still buffered then is written by a later one.

    Args:
        folder: Of the run, as `tensorboard --logdir` finds it; is created.
        config: What was chosen for the run, as JSON values.
        after_step: Of a run that goes on, the last step that it still knows of: what the folder
            shows of later ones is purged, below 0 everything.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        after_step: int | None = None,
    ) -> None:
        try:
            from tensorboard.compat.proto import event_pb2  # noqa: PLC0415 – an optional extra
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415
            from torch.utils.tensorboard import summary  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_NEEDS_TENSORBOARD) from error
        self.folder = Path(folder)
        self._protos, self._summaries = event_pb2, summary
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = _next_event_file(self.folder).open("wb")
        self._records = RecordWriter(self._file)
        self._write(step=0, file_version="brain.Event:2")
        if after_step is not None:
            self._purge(after_step)
        if config is not None:
            compared = dict.fromkeys(_ALWAYS_MEASURED, 0.0)
            experiment, session, _ = summary.hparams(flat_settings(config), compared)
            self._write(step=0, summary=experiment)
            self._write(step=0, summary=session)
        self.flush()

    @property
    def place(self) -> str:
        """The command that shows it."""
        return f"tensorboard --logdir {shlex.quote(str(self.folder))}"

    def publish(self, record: EventRecord) -> None:
        """Write an event's values and, if it is notable, its text; forget steps gone back over."""
        event, seconds = record.event, record.time_seconds
        step = record.step
        if isinstance(event, RunWentBack):
            step = event.to_step
            self._purge(step)
        self._scalars(step, named_values(event), seconds)
        text = told(record)
        if text is not None:
            summary = self._summaries.text(f"events/{event.type}", text)
            self._write(step=step, seconds=seconds, summary=summary)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Write named values, and the epoch; NaN is kept, and marked by TensorBoard."""
        self._scalars(step, {**metrics, "epoch": float(epoch)}, time.time())

    def flush(self) -> None:
        """Hand what was taken to the operating system."""
        self._records.flush()

    def close(self, status: RunStatus = "finished") -> None:
        """Write what was taken, and close the file."""
        self._file.close()

    def _scalars(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        for name, value in values.items():
            self._write(step=step, seconds=seconds, summary=self._summaries.scalar(name, value))

    def _purge(self, after_step: int) -> None:
        """Let TensorBoard forget what came after a step."""
        start = self._protos.SessionLog(status=self._protos.SessionLog.START)
        self._write(step=after_step + 1, session_log=start)

    def _write(self, *, step: int, seconds: float | None = None, **content: Any) -> None:
        wall_time = time.time() if seconds is None else seconds
        event = self._protos.Event(wall_time=wall_time, step=step, **content)
        self._records.write(event.SerializeToString())


def _next_event_file(folder: Path) -> Path:
    """Return a name that sorts after those in the folder: TensorBoard reads them in this order."""
    number = len(list(folder.glob("*tfevents*")))
    return folder / f"events.out.tfevents.{time.time():010.0f}.{number:06d}.{socket.gethostname()}"
