"""A task's run with growth: host, slots, optimizer, policy and loop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from esper.compilation import CompiledHost, CompileService
from esper.experiments.bus_connection import BusConnection
from esper.experiments.config import CompileConfig, RunConfig
from esper.experiments.parts import chosen_policy, learning_rate_factor, usable_device
from esper.experiments.settings import SettingsError
from esper.lifecycle.events import RunFinished
from esper.policies.growth_schedule import GrowthSchedulePolicy
from esper.policies.heuristic import HeuristicPolicy
from esper.slots.attach import attach
from esper.slots.nested import to_device
from esper.slots.slot_set import SlotSet
from esper.tasks.named import named_task
from esper.tasks.task import TaskDataError, TaskSetup
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.sink import Sink
from esper.telemetry.tracker import Tracker
from esper.training.checkpoints import FoundCheckpoint
from esper.training.growth import Growth
from esper.training.policy import Policy
from esper.training.pretrained import save_pretrained
from esper.training.random_states import seed_random_streams
from esper.training.run_cost import Cost, RunCost
from esper.training.sealed_folder import DamagedFolderError
from esper.training.trainer import EpochReport, Trainer


@dataclass(kw_only=True)
class GrowingRun:
    """A prepared run: iterate `reports` to train it, then `finish`."""

    setup: TaskSetup
    growth: Growth
    trainer: Trainer
    total_steps: int
    """Of the optimizer, if no step is refused."""
    resumed: FoundCheckpoint | None = None
    """The checkpoint that it goes on from."""
    trackers: list[Tracker] = field(default_factory=list)
    """What follows it besides its folder."""
    grown_folder: Path | None = None
    """Where `finish` keeps the grown network; None keeps none."""
    finished: bool = False
    """Whether `finish` was called; what comes after it is no part of the run."""
    connection: BusConnection | None = None
    """With the bus; None where the run is connected with nothing."""

    @property
    def reports(self) -> Iterator[EpochReport]:
        """Train, an epoch at each step."""
        return self.trainer.run()

    def param_count(self) -> int:
        """Return the parameters of host and committed seeds."""
        total = sum(parameter.numel() for parameter in self.setup.model.parameters())
        living = (slot.living for slot in self.growth.slots.living_slots)
        return total - sum(branch.param_count for branch in living if branch is not None)

    def judged(self, evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Evaluate what the run has made: its host with what it has committed.

        What no gate has let in is no part of it: a seed that still lives may be one that was
        refused.
        """
        with self.growth.slots.as_committed():
            return evaluate()

    def spent(self, cost: RunCost) -> Cost:
        """Return what the run had to spend, as `Growth.spent` has it."""
        return self.growth.spent(cost)

    def finish(self) -> dict[str, float]:
        """Evaluate on the test split, keep the network that was, and publish the end.

        Both are of the host with what was committed, as `judged` has it; `esper.from_pretrained`
        brings the network back.

        Raises:
            RunFolderError: The network cannot be kept; the run has not finished then.
        """
        with self.growth.slots.as_committed():
            metrics = dict(self.setup.test())
            if self.grown_folder is not None:
                self._keep_grown(self.grown_folder)
        self.growth.publish([RunFinished(metrics=metrics, param_count=self.param_count())])
        self.finished = True
        return metrics

    def _keep_grown(self, folder: Path) -> None:
        try:
            save_pretrained(self.growth.slots, folder, overwrite=True)
        except (DamagedFolderError, OSError) as error:
            raise RunFolderError(
                f"the grown network cannot be kept: {error}; once it can, esper resume ends the run"
            ) from error


def build_setup(config: RunConfig) -> TaskSetup:
    """Return the task's fresh host, on the run's device, and its data.

    The host's weights and the order of the data are the same on every device.

    Raises:
        SettingsError: The device is none that torch can use here.
        TaskDataError: The data cannot be read or used, or there are no batches to train on.
        ModuleNotFoundError: The task needs an extra that is not installed.

    Effects: seeds the process's random streams with the run's seed, as hosts and batches may draw
    from them; what else a run is made of leaves them alone.
    """
    device = usable_device(config.device)
    task = named_task(config.task)
    seed_random_streams(config.random_seed)
    setup = task.build(config.random_seed)
    if len(setup.batches) == 0:
        raise TaskDataError(
            f"task {config.task!r} has no batches to train on; what it builds must hold some in "
            "TaskSetup.batches"
        )
    setup.model.to(device)
    return replace(setup, example=to_device(setup.example, device))


def num_steps(config: RunConfig, setup: TaskSetup) -> int:
    """Return the optimizer steps of a run."""
    trainer = config.trainer
    return trainer.epochs * math.ceil(len(setup.batches) / trainer.accumulation_steps)


def num_decisions(config: RunConfig, setup: TaskSetup) -> int:
    """Return how often a run decides about growth.

    Raises:
        SettingsError: Never once.
    """
    interval, steps = config.trainer.decision_interval_steps, num_steps(config, setup)
    if interval is None:
        return config.trainer.epochs
    if interval > steps:
        raise SettingsError(
            f"trainer.decision_interval_steps is {interval}, and the run has {steps} steps: "
            "nothing would ever be decided; lower it, or leave it out to decide after each epoch"
        )
    return steps // interval


def least_epochs(config: RunConfig, steps: int) -> int:
    """Return the fewest epochs in which a run decides once, at most as many as are configured.

    Args:
        config: Of the run.
        steps: That it has in the configured epochs.
    """
    interval, epochs = config.trainer.decision_interval_steps, config.trainer.epochs
    return 1 if interval is None else min(epochs, math.ceil(interval * epochs / steps))


def prepare(
    config: RunConfig,
    *,
    sinks: Sequence[Sink] = (),
    setup: TaskSetup | None = None,
    policy: Policy | None = None,
    service: CompileService | None = None,
) -> GrowingRun:
    """Build host, slots, optimizer, policy and loop.

    Args:
        config: Of the run.
        sinks: Receive every event and metric.
        setup: From `build_setup`, used by one run only; None builds it.
        policy: Decides instead of the one that `config` names.
        service: Compiles ahead, if the run is to be compiled.

    Raises:
        SettingsError: The task's targets take no slots, a policy's settings cannot be carried
            out on this host, or the run is shorter than the interval between two decisions.

    Effects: sets the process's matmul precision, and what `build_setup` does if it builds.
    """
    setup = setup or build_setup(config)
    slot = config.slot.model_copy(update={"random_seed": config.random_seed})
    try:
        slots = attach(setup.model, setup.targets, example=setup.example, config=slot)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"no slots for the host of task {config.task!r}: {error}") from error
    optimizer = torch.optim.AdamW(
        setup.model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    total_steps = num_steps(config, setup)
    policy = policy or chosen_policy(config)
    growth = Growth(
        slots,
        optimizer,
        policy=policy,
        max_epochs=num_decisions(config, setup),
        sinks=sinks,
        compiled=_compiled_host(config.compile, slots, service),
        count_flops=config.count_flops,
    )
    if isinstance(policy, (GrowthSchedulePolicy, HeuristicPolicy)):
        settings = "heuristic" if isinstance(policy, HeuristicPolicy) else "growth_schedule"
        try:
            policy.check(growth.state())
        except ValueError as error:
            raise SettingsError(f"{settings}: {error}") from error
    scheduler = LambdaLR(optimizer, learning_rate_factor(config, total_steps))
    trainer = Trainer(
        growth,
        setup.batches,
        loss=setup.loss,
        evaluate=setup.validation,
        config=config.trainer,
        scheduler=scheduler,
    )
    return GrowingRun(setup=setup, growth=growth, trainer=trainer, total_steps=total_steps)


def _compiled_host(
    config: CompileConfig, slots: SlotSet, service: CompileService | None
) -> CompiledHost | None:
    return CompiledHost(slots, service=service, mode=config.mode) if config.enabled else None
