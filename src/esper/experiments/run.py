"""Running a task with growth into a run folder."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch.optim.lr_scheduler import LambdaLR

from esper.experiments.config import RunConfig, SettingsError
from esper.lifecycle.events import RunFinished, RunStarted
from esper.policies.depth_schedule import SLOPE, DepthSchedulePolicy, slope_policy
from esper.policies.heuristic import HeuristicPolicy
from esper.policies.named import named_policy
from esper.slots.attach import attach
from esper.slots.nested import to_device
from esper.tasks.named import named_task
from esper.tasks.task import TaskSetup
from esper.telemetry.environment import describe_environment
from esper.telemetry.run_store import WEIGHTS_FILE, RunStatus, RunStore
from esper.telemetry.sink import Sink
from esper.training.growth import Growth
from esper.training.policy import FrugalPolicy, Policy
from esper.training.precision import matmul_settings, set_matmul_precision
from esper.training.run_cost import Cost, RunCost
from esper.training.trainer import EpochReport, Trainer


@dataclass(kw_only=True)
class GrowingRun:
    """A prepared run: iterate `reports` to train it, then `finish`."""

    setup: TaskSetup
    growth: Growth
    reports: Iterator[EpochReport]
    run_id: str
    weights_file: Path | None = None
    """Where `finish` keeps the weights; None keeps none."""
    finished: bool = False
    """Whether `finish` was called; what comes after it is no part of the run."""

    def param_count(self) -> int:
        """Return the parameters of the network as it is now."""
        return sum(parameter.numel() for parameter in self.setup.model.parameters())

    def spent(self, cost: RunCost) -> Cost:
        """Return what a run had to spend: training, and what growth took to decide.

        A plain evaluation counts where the policy decides by its loss, and nowhere else: watching
        is not growth's.
        """
        spent = cost.training + cost.decision
        policy = self.growth.policy
        if isinstance(policy, FrugalPolicy) and not policy.reads_losses:
            return spent
        return spent + cost.evaluation

    def finish(self) -> dict[str, float]:
        """Evaluate on the test split, keep the weights in the run folder, publish the end."""
        metrics = self.setup.test()
        if self.weights_file is not None:
            safetensors.torch.save_model(self.setup.model, str(self.weights_file))
        self.growth.publish([RunFinished(metrics=metrics, param_count=self.param_count())])
        self.finished = True
        return metrics


def build_setup(config: RunConfig) -> TaskSetup:
    """Return the task's fresh host, on the run's device, and its data.

    The host's weights and the order of the data are the same on every device.

    Raises:
        SettingsError: The device is none that torch can use here.
        TaskDataError: The data cannot be read or used.
        ModuleNotFoundError: The task needs an extra that is not installed.
    """
    device = usable_device(config.device)
    setup = named_task(config.task).build(config.random_seed)
    setup.model.to(device)
    return replace(setup, example=to_device(setup.example, device))


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


def prepare(
    config: RunConfig,
    *,
    run_id: str,
    sinks: Sequence[Sink] = (),
    setup: TaskSetup | None = None,
    policy: Policy | None = None,
) -> GrowingRun:
    """Build host, slots, optimizer, policy and loop.

    Args:
        config: Of the run.
        run_id: Published with its start, before the first step.
        sinks: Receive every event and metric.
        setup: From `build_setup`, used by one run only; None builds it.
        policy: Decides instead of the one that `config` names.

    Raises:
        SettingsError: The depth schedule cannot be carried out on this host, or the run is shorter
            than the interval between two decisions.

    Effects: sets the process's matmul precision.
    """
    setup = setup or build_setup(config)
    host_param_count = sum(parameter.numel() for parameter in setup.model.parameters())
    slot = config.slot.model_copy(update={"random_seed": config.random_seed})
    slots = attach(setup.model, setup.targets, example=setup.example, config=slot)
    optimizer = torch.optim.AdamW(
        setup.model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    total_steps = num_steps(config, setup)
    policy = policy or _policy(config)
    growth = Growth(
        slots,
        optimizer,
        policy=policy,
        max_epochs=num_decisions(config, setup),
        sinks=sinks,
        count_flops=config.count_flops,
    )
    if isinstance(policy, DepthSchedulePolicy):
        try:
            policy.check(growth.state())
        except ValueError as error:
            raise SettingsError(f"depth_schedule: {error}") from error
    scheduler = LambdaLR(optimizer, learning_rate_factor(config, total_steps))
    trainer = Trainer(
        growth,
        setup.batches,
        loss=setup.loss,
        evaluate=setup.validation,
        config=config.trainer,
        scheduler=scheduler,
    )
    started = RunStarted(run_id=run_id, slots=tuple(slots), host_param_count=host_param_count)
    return GrowingRun(setup=setup, growth=growth, reports=_reports(trainer, started), run_id=run_id)


def _reports(trainer: Trainer, started: RunStarted) -> Iterator[EpochReport]:
    trainer.growth.publish([started])
    yield from trainer.run()


@contextmanager
def stored_run(
    config: RunConfig, folder: Path, setup: TaskSetup, sinks: Sequence[Sink] = ()
) -> Iterator[GrowingRun]:
    """Open a run folder, and close it with a status however the run ends.

    Args:
        config: Of the run.
        folder: Made if it is not there.
        setup: From `build_setup`, which comes first, so that bad data leaves no folder.
        sinks: Receive every event and metric, besides the folder.

    Effects: sets the process's matmul precision and number of threads.

    Raises:
        RunFolderError: The folder holds a run already.
        SettingsError: As `prepare`; there is no folder then.
    """
    set_matmul_precision(config.trainer.matmul_precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    environment = {
        **describe_environment(torch.device(config.device)),
        "matmul": matmul_settings(),
        "random_seed": config.random_seed,
        "data_notes": list(setup.notes),
    }
    run = prepare(config, run_id=folder.name, setup=setup)
    store = RunStore(folder, config=config.model_dump(mode="json"), environment=environment)
    run.growth.sinks = [store, *sinks]
    try:
        run.weights_file = folder / WEIGHTS_FILE
        yield run
        store.set_status("finished")
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        stopped: RunStatus = "interrupted" if interrupted else "failed"
        store.set_status("finished" if run.finished else stopped)
        raise
    finally:
        store.close()


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


def _policy(config: RunConfig) -> Policy:
    if config.policy == HeuristicPolicy.name:
        return HeuristicPolicy(config.heuristic)
    if config.policy == DepthSchedulePolicy.name:
        return DepthSchedulePolicy(config.depth_schedule)
    if config.policy == SLOPE:
        return slope_policy(config.depth_schedule)
    return named_policy(config.policy, random_seed=config.random_seed)
