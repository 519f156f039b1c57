"""Which tools follow a run, and opening them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from esper.lifecycle.record import Record
from esper.telemetry.mlflow_sink import MlflowSink
from esper.telemetry.prometheus_sink import DEFAULT_PORT, PrometheusSink
from esper.telemetry.tensorboard_sink import TensorBoardSink
from esper.telemetry.tracker import Tracker, TrackerError
from esper.telemetry.wandb_sink import WANDB_FOLDER, WandbMode, WandbSink

TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_FOLDER = "mlflow"
TRACKER_FOLDERS = (TENSORBOARD_FOLDER, MLFLOW_FOLDER, WANDB_FOLDER)
"""What trackers make in a run's folder."""


class TrackingConfig(Record):
    """Which tools follow a run, besides its folder. None of them uses the network by default."""

    tensorboard: bool = False
    """Write event files into the run folder, `tensorboard/`."""
    wandb: bool = False
    """Log a W&B run, with its files in the run folder, `wandb/`."""
    wandb_project: str = "esper"
    wandb_mode: WandbMode = "offline"
    """offline keeps the run for `wandb sync`; online uploads it while it goes on."""
    mlflow: bool = False
    """Log an MLflow run."""
    mlflow_uri: str | None = None
    """Of a server or a store; None is a file store in the run folder, `mlflow/`."""
    mlflow_experiment: str = "esper"
    prometheus: bool = False
    """Serve the newest values for Prometheus, while the run goes on."""
    prometheus_host: str = "127.0.0.1"
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] = DEFAULT_PORT
    """0 takes a free one."""

    @property
    def chosen(self) -> bool:
        """Whether any tool follows."""
        return self.tensorboard or self.wandb or self.mlflow or self.prometheus


def open_trackers(
    tracking: TrackingConfig,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    after_step: int | None = None,
) -> list[Tracker]:
    """Open what is to follow a run.

    Args:
        tracking: What was chosen.
        folder: Of the run.
        config: Everything that was chosen for the run, as JSON values.
        after_step: Of a run that goes on, the last step that it still knows of.

    Raises:
        TrackerError: One cannot be opened, or its extra is not installed; none is open then.
    """
    opened: list[Tracker] = []
    with ExitStack() as on_error:
        for tool, open_one in _chosen(tracking, Path(folder), config, after_step):
            try:
                tracker = open_one()
            except (ModuleNotFoundError, OSError, TrackerError) as error:
                raise TrackerError(f"tracking.{tool}: {error}") from error
            on_error.callback(tracker.close, "failed")
            opened.append(tracker)
        on_error.pop_all()
    return opened


def _chosen(
    tracking: TrackingConfig, folder: Path, config: Mapping[str, Any], after_step: int | None
) -> Iterator[tuple[str, Callable[[], Tracker]]]:
    """Yield what was chosen and how it is opened: first what leaves nothing behind."""
    if tracking.prometheus:
        host, port = tracking.prometheus_host, tracking.prometheus_port
        yield "prometheus", lambda: PrometheusSink(host=host, port=port, name=folder.name)
    if tracking.tensorboard:
        files = folder / TENSORBOARD_FOLDER
        yield "tensorboard", lambda: TensorBoardSink(files, config=config, after_step=after_step)
    if tracking.mlflow:
        yield (
            "mlflow",
            lambda: MlflowSink(
                folder / MLFLOW_FOLDER,
                tracking_uri=tracking.mlflow_uri,
                experiment=tracking.mlflow_experiment,
                name=folder.name,
                config=config,
                after_step=after_step,
            ),
        )
    if tracking.wandb:
        yield (
            "wandb",
            lambda: WandbSink(
                folder,
                project=tracking.wandb_project,
                mode=tracking.wandb_mode,
                name=folder.name,
                config=config,
                after_step=after_step,
            ),
        )
