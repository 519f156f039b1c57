"""Sinks for events and metrics, and the run folder."""

from esper.telemetry.environment import describe_environment
from esper.telemetry.run_store import (
    DATABASE_FILE,
    WEIGHTS_FILE,
    MetricRow,
    RunFolderError,
    RunReader,
    RunStore,
)
from esper.telemetry.sink import Sink
from esper.telemetry.sink_guard import SinkGuard

__all__ = [
    "DATABASE_FILE",
    "WEIGHTS_FILE",
    "MetricRow",
    "RunFolderError",
    "RunReader",
    "RunStore",
    "Sink",
    "SinkGuard",
    "describe_environment",
]
