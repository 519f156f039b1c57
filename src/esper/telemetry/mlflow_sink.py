"""Events and metrics for MLflow."""

import os
import random
import re
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from esper.lifecycle.events import EventRecord, StageChanged
from esper.telemetry.progress import progress_of
from esper.telemetry.run_folder import RunStatus
from esper.telemetry.tracked_values import named_values, told
from esper.telemetry.tracker import (
    Tracker,
    TrackerError,
    flat_settings,
    read_run_id,
    write_run_id,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric

_NEEDS_MLFLOW = "MlflowSink needs MLflow: pip install 'esper-lite[mlflow]'"
_REFUSED_CHARACTERS = re.compile(r"[^A-Za-z0-9_./ :-]")
_MAX_PARAM_CHARACTERS = 6000
"""What MLflow takes in one value."""
_ENDINGS: Mapping[RunStatus, str] = {
    "finished": "FINISHED",
    "interrupted": "KILLED",
    "stopped": "KILLED",
}

_MAX_LINES = 5000
"""Of the file of events, which is sent whole at each flush."""


@final
class MlflowSink(Tracker):
    """Logs an MLflow run: metrics and params, each slot's stage as a tag, events as an artifact.

    What is taken is sent by `flush`, in a thread: a server that does not answer holds up a run by
    `limit_seconds` for each attempt at most, and one attempt waits for the other.

    Args:
        folder: Holds a local file store, unless there is a `tracking_uri`, and the run's id.
        tracking_uri: Of a server or a store; None uses no network.
        experiment: Which the run belongs to; is created.
        name: Of the run; None lets MLflow make one up.
        config: What was chosen for the run, as JSON values.
        after_step: Of a run that goes on, the last step that it still knows of: the same MLflow run
            goes on. MLflow cannot forget what it has been told of later ones, they are told again.
        limit_seconds: How long `flush` waits; `close` waits ten times as long.

    Raises:
        ModuleNotFoundError: MLflow is not installed.
        TrackerError: The store or server refuses the run.

    Effects: without a `tracking_uri` it turns off MLflow's usage reports, which would use the
    network (MLFLOW_DISABLE_TELEMETRY, unless it is set), and says that a file store is meant
    (MLFLOW_ALLOW_FILE_STORE).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tracking_uri: str | None = None,
        experiment: str = "esper",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        after_step: int | None = None,
        limit_seconds: float = 5.0,
    ) -> None:
        if tracking_uri is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow import MlflowClient, entities  # noqa: PLC0415 – an optional extra
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_NEEDS_MLFLOW) from error
        self.folder = Path(folder)
        self.tracking_uri = tracking_uri or self.folder.absolute().as_uri()
        self._entities = entities
        self._limit_seconds = limit_seconds
        self._unit = progress_of(config or {}).unit
        known = None if after_step is None else read_run_id(self.folder)
        try:
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
            if known is None:
                drawn = random.getstate()  # now and then MLflow draws from it for an id
                known = self._create_run(experiment, name)
                random.setstate(drawn)
                self._log_config(known, config or {})
            else:
                self._client.update_run(known, status="RUNNING")
        except Exception as error:
            raise TrackerError(
                f"MLflow cannot begin a run at {self.tracking_uri}: {error}"
            ) from error
        self.run_id = known
        write_run_id(self.folder, known)
        began = after_step is None or after_step < 0
        self._events_file = "events.txt" if began else f"events_after_step_{after_step}.txt"
        self._metrics: list[Metric] = []
        self._stages: dict[str, str] = {}
        self._lines: deque[str] = deque(maxlen=_MAX_LINES)
        self._lines_changed = False
        self._sending: Future[None] | None = None

    @property
    def place(self) -> str:
        """The command that shows a local store, or the address."""
        if self.tracking_uri.startswith("file:"):
            own = self.folder.absolute().as_uri() == self.tracking_uri
            store = str(self.folder) if own else self.tracking_uri
            return (
                f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {shlex.quote(store)}"
            )
        return self.tracking_uri

    def publish(self, record: EventRecord) -> None:
        """Keep an event's values, the stage and, if it is notable, its text for the next flush."""
        event = record.event
        self._keep(record.step, record.time_seconds, named_values(event))
        if isinstance(event, StageChanged):
            self._stages[_accepted(f"slots/{event.slot}/stage")] = event.to_stage.value
        text = told(record)
        if text is not None:
            self._lines.append(f"{self._unit} {record.epoch}, step {record.step}: {text}")
            self._lines_changed = True

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Keep named values for the next flush; NaN is a value to MLflow."""
        self._keep(step, time.time(), {**metrics, "epoch": float(epoch)})

    def flush(self) -> None:
        """Send what was taken, unless what was sent before is still on its way.

        Raises:
            mlflow.exceptions.MlflowException: What was sent was refused, and is lost.
        """
        if self._sending is not None:
            if not self._sending.done():
                return
            self._conclude()
        taken = self._taken()
        self._sending = _in_background(lambda: self._send(*taken))
        wait([self._sending], self._limit_seconds)
        if self._sending.done():
            self._conclude()

    def _taken(self) -> "tuple[list[Metric], dict[str, str], str | None]":
        """Return what was kept for the next flush, and keep it no longer."""
        metrics, stages = self._metrics, self._stages
        text = "\n".join([*self._lines, ""]) if self._lines_changed else None
        self._metrics, self._stages, self._lines_changed = [], {}, False
        return metrics, stages, text

    def close(self, status: RunStatus = "finished") -> None:
        """Send the rest, and say how the run ended.

        Raises:
            TimeoutError: The server does not answer; what it was not told is lost.
        """
        limit = 10.0 * self._limit_seconds
        try:
            if self._sending is not None:
                wait([self._sending], limit)
            try:
                self.flush()
            finally:  # of one that was refused the rest can be sent still
                if self._metrics or self._lines_changed:
                    self.flush()
            if self._sending is not None:
                self._await(self._sending, limit)
        finally:
            ending = _ENDINGS.get(status, "FAILED")
            ended = _in_background(lambda: self._client.set_terminated(self.run_id, ending))
            self._await(ended, limit)

    def _create_run(self, experiment: str, name: str | None) -> str:
        found = self._client.get_experiment_by_name(experiment)
        identity = (
            self._client.create_experiment(experiment) if found is None else found.experiment_id
        )
        return str(self._client.create_run(identity, run_name=name).info.run_id)

    def _log_config(self, run_id: str, config: Mapping[str, Any]) -> None:
        params = [
            self._entities.Param(_accepted(name), str(value)[:_MAX_PARAM_CHARACTERS])
            for name, value in flat_settings(config).items()
        ]
        self._client.log_batch(run_id, params=params)

    def _keep(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        milliseconds = round(1e3 * seconds)
        for name, value in values.items():
            metric = self._entities.Metric(_accepted(name), value, milliseconds, step)
            self._metrics.append(metric)

    def _send(self, metrics: "list[Metric]", stages: Mapping[str, str], text: str | None) -> None:
        tags = [self._entities.RunTag(key, value) for key, value in stages.items()]
        self._client.log_batch(self.run_id, metrics=metrics, tags=tags)
        if text is not None:
            self._client.log_text(self.run_id, text, self._events_file)

    def _await(self, answer: Future[None], limit_seconds: float) -> None:
        done, _ = wait([answer], limit_seconds)
        if not done:
            raise TimeoutError(f"{self.tracking_uri} has not answered for {limit_seconds:g} s")
        answer.result()

    def _conclude(self) -> None:
        """Let go of what was sent, and raise what came of it."""
        sent, self._sending = self._sending, None
        if sent is not None:
            sent.result()


def _accepted(name: str) -> str:
    """Return a name with what MLflow refuses replaced."""
    return _REFUSED_CHARACTERS.sub("_", name)


def _in_background(call: Callable[[], object]) -> Future[None]:
    """Call in a thread that does not keep the process from its end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 – the caller's, who asks for the result
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future
