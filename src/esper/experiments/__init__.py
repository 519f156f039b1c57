"""Configured runs of a task."""

from esper.experiments.audit import ForkPoint, Twin, prepare_twin
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import GrowingRun, build_setup, prepare
from esper.experiments.settings import SettingsError
from esper.experiments.stored_run import stored_run

__all__ = [
    "ForkPoint",
    "GrowingRun",
    "RunConfig",
    "SettingsError",
    "Twin",
    "build_setup",
    "load_run_config",
    "prepare",
    "prepare_twin",
    "stored_run",
]
