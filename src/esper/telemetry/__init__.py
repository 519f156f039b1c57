"""Sinks for events and metrics, and the run folder."""

from esper.telemetry.command_log import CommandLog
from esper.telemetry.environment import describe_environment
from esper.telemetry.log_sink import LogSink
from esper.telemetry.mlflow_sink import MlflowSink
from esper.telemetry.prometheus_sink import PrometheusSink
from esper.telemetry.run_folder import DATABASE_FILE, GROWN_FOLDER, RunFolderError
from esper.telemetry.run_reader import MetricRow, RunReader
from esper.telemetry.run_store import ReopenedRunStore, RunStore
from esper.telemetry.sink import Sink
from esper.telemetry.sink_guard import SinkGuard
from esper.telemetry.tensorboard_sink import TensorBoardSink
from esper.telemetry.tracker import Tracker, TrackerError
from esper.telemetry.tracking import TrackingConfig, open_trackers
from esper.telemetry.wandb_sink import WandbSink

__all__ = [
    "DATABASE_FILE",
    "GROWN_FOLDER",
    "CommandLog",
    "LogSink",
    "MetricRow",
    "MlflowSink",
    "PrometheusSink",
    "ReopenedRunStore",
    "RunFolderError",
    "RunReader",
    "RunStore",
    "Sink",
    "SinkGuard",
    "TensorBoardSink",
    "Tracker",
    "TrackerError",
    "TrackingConfig",
    "WandbSink",
    "describe_environment",
    "open_trackers",
]
