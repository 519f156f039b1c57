"""Everything that a run can be told, from a file, from `key=value` settings, from options."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationError, model_validator

from esper.bus.addresses import check_no_password
from esper.bus.command_receiver import DEFAULT_WINDOW_SECONDS
from esper.experiments.settings import SettingsError, explain, merge, parse_setting, read_settings
from esper.lifecycle.record import Record
from esper.policies.growth_schedule import (
    SLOPE,
    GrowthScheduleConfig,
    GrowthSchedulePolicy,
    slope_policy,
)
from esper.policies.heuristic import UCB1_POLICY, HeuristicConfig, HeuristicPolicy
from esper.policies.named import policy_of_anywhere
from esper.slots.config import SlotConfig
from esper.tasks.collection.address import address_of_anywhere
from esper.tasks.named import named_task
from esper.tasks.task import Task
from esper.telemetry.tracking import TrackingConfig
from esper.training.trainer_config import TrainerConfig

_ROUNDING = 1e-9


def _device_name(name: str) -> str:
    if re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name) is None:
        raise ValueError(f"a device is cpu, cuda or cuda:N, got {name!r}")
    return name


Device = Annotated[str, AfterValidator(_device_name)]
"""Name of a kind of device that a run can train on, or of one of several."""

RandomSeed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
"""What torch's generators take."""

KeyFile = Annotated[Path, AfterValidator(Path.absolute)]
"""The same file for whoever goes on with the run, from wherever."""


class CheckpointConfig(Record):
    """When a run is kept, so that it can go on if it is killed."""

    enabled: bool = True
    interval_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two checkpoints; None makes them between epochs."""
    min_seconds: Annotated[FiniteFloat, Field(ge=0.0)] = 30.0
    """Between epochs: at least so long after the last one."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    keep_best: bool = True
    """Whether the one with the lowest held-out loss stays besides."""


class CompileConfig(Record):
    """Whether host and seeds run compiled by torch.compile, and who compiles."""

    enabled: bool = False
    ahead: bool = True
    """A process beside the run compiles seeds, and keeps what it has compiled; else the run does it
    itself, between two steps, and waits."""
    store: str | None = None
    """Folder, or URL of fsspec, of what was compiled; None is a folder in the user's caches."""
    key_file: KeyFile | None = None
    """Signs and verifies it; None is the user's own."""
    limit_seconds: Annotated[FiniteFloat, Field(gt=0.0)] = 600.0
    """For the graphs of one seed, compiled ahead; then it is given up and the seed runs as it is.
    Without `ahead` the run waits as long as it takes."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )


class BusConfig(Record):
    """Where a run listens for commands and tells of itself; see docs/operate.md.

    A password is never written here, as settings are kept in the run folder: it is read from the
    environment variable ESPER_BUS_PASSWORD.
    """

    commands: str | None = None
    """Address of the server, as redis://127.0.0.1:6379/0; None connects the run with nothing."""
    telemetry: str | None = None
    """Of the one that takes events and metrics; None is the same."""
    key_file: KeyFile | None = None
    """Signs and verifies; None is the user's own."""
    window_seconds: Annotated[FiniteFloat, Field(gt=0.0)] = DEFAULT_WINDOW_SECONDS
    """How far apart a command may be sent and received."""

    @model_validator(mode="after")
    def _is_whole(self) -> "BusConfig":
        if self.telemetry is not None and self.commands is None:
            raise ValueError(
                "bus.telemetry is set, and bus.commands is not; set bus.commands, alone if one "
                "server does for both"
            )
        for name, address in (("bus.commands", self.commands), ("bus.telemetry", self.telemetry)):
            if address is not None:
                check_no_password(name, address)
        return self


class RunConfig(Record):
    """A run, fully specified; kept as config.json in the run folder."""

    task: Annotated[str, AfterValidator(address_of_anywhere)]
    policy: Annotated[str, AfterValidator(policy_of_anywhere)] = HeuristicPolicy.name
    """Name of a policy, `python:MODULE:NAME` of one's own, or a file that `esper policy train` has
    written."""
    random_seed: RandomSeed = 0
    learning_rate: Annotated[FiniteFloat, Field(gt=0.0)]
    weight_decay: Annotated[FiniteFloat, Field(ge=0.0)] = 0.01
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Learning rate over the run; wsd is stable first and falls linearly to 0 at the end, so that
    what grows in the stable phase has a full learning rate left."""
    decay_fraction: Annotated[FiniteFloat, Field(gt=0.0, le=1.0)] = 0.3
    """Share of the run in which wsd falls."""
    warmup_fraction: Annotated[FiniteFloat, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the run in which the learning rate first rises."""
    device: Device = "cpu"
    """Where the run trains: cpu, cuda, or cuda:N."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of torch in this process; None leaves torch's choice."""
    count_flops: bool = True
    """Whether floating-point operations are counted; the first step of each structure and every
    decision then run slower."""
    compile: CompileConfig = CompileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    bus: BusConfig = BusConfig()
    trainer: TrainerConfig
    slot: SlotConfig
    heuristic: HeuristicConfig
    growth_schedule: GrowthScheduleConfig

    @model_validator(mode="after")
    def _can_be_captured(self) -> "RunConfig":
        if not self.trainer.cuda_graphs:
            return self
        if not self.device.startswith("cuda"):
            raise ValueError(
                f"trainer.cuda_graphs needs a CUDA device, and this run is on {self.device}; add "
                "device=cuda, or leave it out"
            )
        if self.compile.enabled and self.compile.mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"trainer.cuda_graphs and compile.mode={self.compile.mode}, which captures CUDA "
                "graphs of its own, exclude each other; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _steps_its_schedule(self) -> "RunConfig":
        if self.trainer.scheduler_interval != "step":
            raise ValueError(
                "trainer.scheduler_interval is 'step' in a run of a task, whose schedules count "
                f"steps, got {self.trainer.scheduler_interval!r}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _has_one_random_seed(self) -> "RunConfig":
        if self.slot.random_seed != SlotConfig.model_fields["random_seed"].default:
            raise ValueError(
                f"slot.random_seed is the run's own, got {self.slot.random_seed}; set random_seed"
            )
        return self

    @model_validator(mode="after")
    def _grows_in_the_stable_phase(self) -> "RunConfig":
        schedule = self.growth_schedule
        if self.policy == GrowthSchedulePolicy.name:
            _check_growth_times(self, "fractions", schedule.fractions[0], schedule.fractions[-1])
        elif self.policy == SLOPE:
            slope_policy(schedule)
            earliest, latest = schedule.earliest_fraction, schedule.latest_fraction
            _check_growth_times(self, "earliest_fraction and latest_fraction", earliest, latest)
        patience = {
            HeuristicPolicy.name: ("heuristic", self.heuristic.patience_epochs),
            UCB1_POLICY: ("heuristic", self.heuristic.patience_epochs),
            GrowthSchedulePolicy.name: ("growth_schedule", schedule.patience_epochs),
            SLOPE: ("growth_schedule", schedule.patience_epochs),
        }
        if self.policy in patience:
            _check_patience(*patience[self.policy], self.slot.thresholds.trial_epochs)
        return self


def _followed_by_nothing(run: RunConfig) -> RunConfig:
    """Return settings that many runs share, none of which belongs to one run alone."""
    for name, chosen in (
        ("tracking follows", run.tracking.chosen),
        ("bus connects", run.bus.commands is not None),
    ):
        if chosen:
            raise ValueError(
                f"{name} one run, and these are many; leave it out, or make a run by esper grow"
            )
    return run


SharedRunConfig = Annotated[RunConfig, AfterValidator(_followed_by_nothing)]
"""What many runs have in common."""


def _check_growth_times(config: RunConfig, names: str, first: float, last: float) -> None:
    if config.schedule == "cosine":
        raise ValueError(
            f"schedule=cosine falls from the first step, and the policy {config.policy} grows "
            "while the learning rate is stable; choose schedule=wsd or schedule=constant"
        )
    if config.schedule == "wsd" and last + config.decay_fraction > 1.0 + _ROUNDING:
        raise ValueError(
            f"growth_schedule.{names}: at {last} the learning rate is falling already, with "
            f"decay_fraction={config.decay_fraction} it is stable up to "
            f"{1.0 - config.decay_fraction:.4g} of the run; grow earlier, or let it fall later"
        )
    if first < config.warmup_fraction:
        raise ValueError(
            f"growth_schedule.{names}: at {first} the learning rate is rising still; it is stable "
            f"from warmup_fraction={config.warmup_fraction} of the run on, grow later"
        )


def _check_patience(section: str, patience: int, trial: int) -> None:
    if patience <= trial:
        raise ValueError(
            f"{section}.patience_epochs is {patience}, and a trial takes "
            f"slot.thresholds.trial_epochs={trial}: every seed would be pruned before its trial is "
            "over; make patience_epochs larger"
        )


def task_defaults(task: Task) -> dict[str, Any]:
    """Return the task's own settings, in the layout of `RunConfig`."""
    return {
        "task": task.name,
        "policy": task.policy,
        "learning_rate": task.learning_rate,
        "warmup_fraction": task.warmup_fraction,
        "threads": task.threads,
        "trainer": {
            "epochs": task.epochs,
            "scheduler_interval": "step",
            "max_gradient_norm": task.max_gradient_norm,
        },
        "slot": task.slot.model_dump(mode="json"),
        "heuristic": task.heuristic.model_dump(mode="json"),
        "growth_schedule": task.growth_schedule.model_dump(mode="json"),
    }


def load_run_config(
    task: str, file: Path | None, settings: Sequence[str], options: Mapping[str, Any]
) -> RunConfig:
    """Merge the task's defaults, a TOML file, `key=value` settings and options, later ones last.

    Raises:
        SettingsError: The file cannot be read, or a key or value is wrong; the key is named
            with the nearest one that exists. The task does not exist, its data cannot be found, it
            needs an extra that is not installed, or the settings are those of another task.
    """
    try:
        task = address_of_anywhere(task)  # as it is kept: data is opened once
        merged = task_defaults(named_task(task))
    except (ValueError, ModuleNotFoundError) as error:
        raise SettingsError(str(error)) from error
    if file is not None:
        merge(merged, read_settings(file))
    for setting in settings:
        merge(merged, parse_setting(setting, RunConfig))
    merge(merged, {key: value for key, value in options.items() if value is not None})
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise SettingsError(explain(error, RunConfig)) from error
    if config.task != task:
        raise SettingsError(
            f"task: {task!r} is named, and the settings are for {config.task!r}; name that one, or "
            "leave task out of them"
        )
    return config
