"""Configured runs of a task."""

from esper.experiments.audit import ForkPoint, Twin, prepare_twin
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import GrowingRun, build_setup, prepare, stored_run
from esper.experiments.settings import SettingsError

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
