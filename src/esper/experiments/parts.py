"""The parts of a run that its settings name."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from esper.compilation import CompileService
from esper.compilation.artefact_store import ArtefactStore
from esper.compilation.inductor_cache import CacheFolderError, user_cache_folder
from esper.experiments.bus_connection import BusConnection
from esper.experiments.config import CheckpointConfig, CompileConfig, RunConfig
from esper.experiments.settings import SettingsError
from esper.policies.growth_schedule import SLOPE, GrowthSchedulePolicy, slope_policy
from esper.policies.heuristic import UCB1_POLICY, HeuristicPolicy, ucb1_policy
from esper.policies.learned.learned_policy import LearnedPolicy
from esper.policies.named import is_policy_file, named_policy
from esper.signing import Keyring
from esper.telemetry.run_folder import CHECKPOINTS_FOLDER
from esper.telemetry.tracker import Tracker, TrackerError
from esper.telemetry.tracking import open_trackers
from esper.training.checkpoints import Checkpoints
from esper.training.policy import Policy


def usable_device(name: str) -> torch.device:
    """Return a device by its name.

    Raises:
        SettingsError: It is none that torch can use here.
    """
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        count = torch.cuda.device_count()
        raise SettingsError(
            f"device {name!r} cannot be used here, torch {torch.__version__} sees {count} CUDA "
            f"devices: {error}; leave it out to train on the CPU"
        ) from error
    return device


def chosen_policy(config: RunConfig) -> Policy:
    """Return the policy that a run names, fresh.

    Raises:
        SettingsError: There is none of that name, or the file holds none that can be used here.
    """
    if config.policy == HeuristicPolicy.name:
        return HeuristicPolicy(config.heuristic)
    if config.policy == UCB1_POLICY:
        return ucb1_policy(config.heuristic)
    if config.policy == GrowthSchedulePolicy.name:
        return GrowthSchedulePolicy(config.growth_schedule)
    if config.policy == SLOPE:
        return slope_policy(config.growth_schedule)
    try:
        if is_policy_file(config.policy):
            return LearnedPolicy.load(config.policy, random_seed=config.random_seed)
        return named_policy(config.policy, random_seed=config.random_seed)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def learning_rate_factor(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor by step, at most 1."""
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    warmup_steps = round(config.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if config.schedule == "wsd":
            return min(rising, max(0.0, (total_steps - step) / decay_steps))
        if config.schedule == "cosine":
            return rising * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))
        return rising

    return factor


def artefact_store(config: CompileConfig) -> ArtefactStore:
    """Return where compiled graphs are kept.

    Raises:
        SettingsError: Its URL cannot be used, nothing answers there, or the keys cannot be read.
    """
    url = config.store or str(user_cache_folder() / "compiled")
    try:
        file = config.key_file
        keyring = Keyring.of_user() if file is None else Keyring.from_file(file)
        return ArtefactStore(url, keyring)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"compile: {error}") from error
    except OSError as error:  # some file systems connect at once
        raise SettingsError(f"compile: the store {url} cannot be used: {error}") from error


@contextmanager
def compile_service(config: CompileConfig) -> Iterator[CompileService | None]:
    """Compile ahead as long as the context is open, if that is wanted.

    Raises:
        SettingsError: As `artefact_store`, or inductor's folder cannot be used.
    """
    if not (config.enabled and config.ahead):
        yield None
        return
    store = artefact_store(config)
    try:
        service = CompileService(store, limit_seconds=config.limit_seconds)
    except CacheFolderError as error:
        raise SettingsError(f"compile: {error}") from error
    with service:
        yield service


def checkpoints_in(config: CheckpointConfig, folder: Path) -> Checkpoints | None:
    """Return the checkpoints of a run folder; None if there are to be none."""
    if not config.enabled:
        return None
    return Checkpoints(
        folder / CHECKPOINTS_FOLDER,
        interval_steps=config.interval_steps,
        min_seconds=config.min_seconds,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
    )


def connection_with_bus(config: RunConfig) -> BusConnection | None:
    """Return a run's connection with the bus, not open yet; None if it is to have none.

    Raises:
        SettingsError: It cannot be made.
    """
    return BusConnection(config.bus) if config.bus.commands else None


def opened_trackers(
    config: RunConfig, folder: Path, after_step: int | None = None
) -> list[Tracker]:
    """Open what is to follow a run.

    Raises:
        SettingsError: One cannot be opened.
    """
    chosen = config.model_dump(mode="json")
    try:
        return open_trackers(config.tracking, folder, config=chosen, after_step=after_step)
    except TrackerError as error:
        raise SettingsError(str(error)) from error
