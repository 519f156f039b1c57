"""Configured runs of a task."""

from esper.experiments.config import RunConfig, SettingsError, load_run_config
from esper.experiments.run import GrowingRun, build_setup, prepare, stored_run

__all__ = [
    "GrowingRun",
    "RunConfig",
    "SettingsError",
    "build_setup",
    "load_run_config",
    "prepare",
    "stored_run",
]
