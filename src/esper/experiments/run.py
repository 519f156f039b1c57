"""Running a task with growth into a run folder."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.optim.lr_scheduler import LambdaLR

from esper.compilation import CompiledHost, CompileService
from esper.compilation.artefact_store import ArtefactStore
from esper.compilation.inductor_cache import CacheFolderError, user_cache_folder
from esper.experiments.bus_connection import BusConnection
from esper.experiments.config import CheckpointConfig, CompileConfig, RunConfig
from esper.experiments.settings import SettingsError
from esper.lifecycle.events import RunFinished, RunStarted
from esper.policies.depth_schedule import SLOPE, DepthSchedulePolicy, slope_policy
from esper.policies.heuristic import UCB1_POLICY, HeuristicPolicy, ucb1_policy
from esper.policies.learned.learned_policy import LearnedPolicy
from esper.policies.named import is_policy_file, named_policy
from esper.signing import Keyring
from esper.slots.attach import attach
from esper.slots.nested import to_device
from esper.slots.slot_set import SlotSet
from esper.tasks.named import named_task
from esper.tasks.task import TaskSetup
from esper.telemetry.environment import describe_environment
from esper.telemetry.heartbeat import Heartbeat
from esper.telemetry.run_store import (
    CHECKPOINTS_FOLDER,
    RUN_FILES,
    WEIGHTS_FILE,
    ReopenedRunStore,
    RunFolderError,
    RunReader,
    RunStatus,
    RunStore,
)
from esper.telemetry.sink import Sink
from esper.telemetry.tracker import Tracker, TrackerError
from esper.telemetry.tracking import TRACKER_FOLDERS, open_trackers
from esper.training.checkpoints import CheckpointError, Checkpoints, FoundCheckpoint
from esper.training.control import RunControl, RunStoppedError
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
    trainer: Trainer
    run_id: str
    total_steps: int
    """Of the optimizer, if no step is refused."""
    resumed: FoundCheckpoint | None = None
    """The checkpoint that it goes on from."""
    trackers: list[Tracker] = field(default_factory=list)
    """What follows it besides its folder."""
    weights_file: Path | None = None
    """Where `finish` keeps the weights; None keeps none."""
    finished: bool = False
    """Whether `finish` was called; what comes after it is no part of the run."""
    connection: BusConnection | None = None
    """With the bus; None where the run is connected with nothing."""

    @property
    def reports(self) -> Iterator[EpochReport]:
        """Train, an epoch at each step; a run from the start is announced first."""
        if self.resumed is None:
            parameters = self.setup.model.parameters()
            count = sum(parameter.numel() for parameter in parameters)
            slots = tuple(self.growth.slots)
            started = RunStarted(run_id=self.run_id, slots=slots, host_param_count=count)
            self.growth.publish([started])
        yield from self.trainer.run()

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
    service: CompileService | None = None,
) -> GrowingRun:
    """Build host, slots, optimizer, policy and loop.

    Args:
        config: Of the run.
        run_id: Published with its start, before the first step.
        sinks: Receive every event and metric.
        setup: From `build_setup`, used by one run only; None builds it.
        policy: Decides instead of the one that `config` names.
        service: Compiles ahead, if the run is to be compiled.

    Raises:
        SettingsError: The depth schedule cannot be carried out on this host, or the run is shorter
            than the interval between two decisions.

    Effects: sets the process's matmul precision.
    """
    setup = setup or build_setup(config)
    slot = config.slot.model_copy(update={"random_seed": config.random_seed})
    slots = attach(setup.model, setup.targets, example=setup.example, config=slot)
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
    return GrowingRun(
        setup=setup, growth=growth, trainer=trainer, run_id=run_id, total_steps=total_steps
    )


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
        SettingsError: As `prepare`, compiled graphs cannot be kept, the bus is set wrongly, or a
            tracker cannot be opened; there is no folder then.
        CheckpointError: Checkpoints cannot be written.
    """
    _set_process(config)
    environment = {
        **describe_environment(torch.device(config.device)),
        "matmul": matmul_settings(),
        "random_seed": config.random_seed,
        "data_notes": list(setup.notes),
    }
    with _compile_service(config.compile) as service:
        run = prepare(config, run_id=folder.name, setup=setup, service=service)
        run.connection = _connection(config)
        store, run.trackers = _new_folder(config, folder, environment)
        with _in_folder(run, store, sinks, after_step=-1):
            run.trainer.keeper = _checkpoints(config.checkpoint, folder)
            yield run


@contextmanager
def resumed_run(folder: Path, sinks: Sequence[Sink] = ()) -> Iterator[GrowingRun]:
    """Go on with a run that was stopped, from its newest checkpoint that is whole.

    On a CPU what follows is, to the bit, what would have followed. Without any checkpoint the run
    begins anew.

    Args:
        folder: Of the run.
        sinks: Receive every further event and metric, besides the folder.

    Effects: sets the process's matmul precision and number of threads. What the folder holds of
    steps after the checkpoint is forgotten.

    Raises:
        RunFolderError: It is no run folder, the run is finished, or a process writes it.
        CheckpointError: Every checkpoint is damaged, or of another version.
        SettingsError: As `prepare`, or a tracker cannot be opened; the run can be resumed still.
        TaskDataError: The data cannot be read or used any more.
        ModuleNotFoundError: The task needs an extra that is not installed.
    """
    reader = RunReader(folder)
    if reader.status == "finished":
        raise RunFolderError(f"{folder} holds a run that is finished; there is nothing to resume")
    config = RunConfig.model_validate(reader.config())
    _set_process(config)
    with _compile_service(config.compile) as service:
        run = prepare(config, run_id=folder.name, service=service)
        checkpoints = _checkpoints(config.checkpoint, folder)
        found = checkpoints.newest() if checkpoints is not None and checkpoints.names() else None
        after_step = -1 if found is None else found.info.step
        store = ReopenedRunStore(folder, after_step=after_step)
        run.trainer.keeper, run.resumed = checkpoints, found
        try:
            run.connection = _connection(config)
            run.trackers = _trackers(config, folder, after_step=after_step)
        except BaseException:
            _close(run, store, "failed")
            raise
        with _in_folder(run, store, sinks, after_step=after_step):
            if found is not None:
                _give(found, run.trainer)
            yield run


def _give(found: FoundCheckpoint, trainer: Trainer) -> None:
    """Let a run go on from a checkpoint.

    Raises:
        CheckpointError: Something is not as it was then, as the file of a learned policy.
    """
    try:
        found.give_to(trainer)
    except ValueError as error:
        raise CheckpointError(f"the run cannot go on from {found.name}: {error}") from error


def artefact_store(config: CompileConfig) -> ArtefactStore:
    """Return where compiled graphs are kept.

    Raises:
        SettingsError: Its URL cannot be used, or the keys cannot be read.
    """
    try:
        file = config.key_file
        keyring = Keyring.of_user() if file is None else Keyring.from_file(file)
        return ArtefactStore(config.store or str(user_cache_folder() / "compiled"), keyring)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"compile: {error}") from error


@contextmanager
def _compile_service(config: CompileConfig) -> Iterator[CompileService | None]:
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


def _compiled_host(
    config: CompileConfig, slots: SlotSet, service: CompileService | None
) -> CompiledHost | None:
    return CompiledHost(slots, service=service, mode=config.mode) if config.enabled else None


def _set_process(config: RunConfig) -> None:
    set_matmul_precision(config.trainer.matmul_precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _checkpoints(config: CheckpointConfig, folder: Path) -> Checkpoints | None:
    if not config.enabled:
        return None
    return Checkpoints(
        folder / CHECKPOINTS_FOLDER,
        interval_steps=config.interval_steps,
        min_seconds=config.min_seconds,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
    )


@contextmanager
def _in_folder(
    run: GrowingRun, store: RunStore, sinks: Sequence[Sink], *, after_step: int
) -> Iterator[None]:
    """Let a run write into its folder, and close it with a status however the run ends."""
    run.growth.sinks.extend([store, *run.trackers, *sinks])
    run.weights_file = store.folder / WEIGHTS_FILE
    run.run_id = store.run_id
    status: RunStatus = "failed"
    try:
        _control(run, store, after_step=after_step)
        yield
        status = "finished"
    except BaseException as error:
        if run.finished:
            status = "finished"
        elif isinstance(error, RunStoppedError):
            status = "stopped" if error.commanded else "interrupted"
        elif isinstance(error, KeyboardInterrupt):
            status = "interrupted"
        raise
    finally:
        _close(run, store, status)


def _control(run: GrowingRun, store: RunStore, *, after_step: int) -> None:
    """Let a run be told what to do: what it was told before, and what the bus brings."""
    heartbeat, connection = Heartbeat.from_environment(), run.connection
    control = RunControl(
        store.commands,
        beat=heartbeat.beat if heartbeat.is_supervised else None,
        link=None if connection is None else connection.link,
    )
    run.trainer.control = control
    if connection is None:
        control.paused = False  # nobody could end it
        return
    connection.open(RunReader(store.folder), run.growth, control, after_step=after_step)


def _close(run: GrowingRun, store: RunStore, status: RunStatus) -> None:
    """Close trackers and folder; what cannot be closed, or was lost before, is told."""
    guard, connection, control = run.growth.sink_guard, run.connection, run.trainer.control
    with ExitStack() as last_first:  # all of it, also where closing one is interrupted
        last_first.callback(guard.attempt, store, lambda store: store.close())
        if connection is not None:
            last_first.callback(connection.close, status)
        last_first.callback(lambda: run.growth.publish(guard.losses))
        for tracker in reversed(run.trackers):
            last_first.callback(run.growth.sinks.remove, tracker)
            last_first.callback(guard.attempt, tracker, lambda tracker: tracker.close(status))
        last_first.callback(guard.attempt, store, lambda store: store.set_status(status))
        if connection is not None:
            finished = status == "finished"
            last_first.callback(connection.stop_receiving, refuse_rest=finished)
        if control is not None:
            refusal = "the run has finished" if status == "finished" else None
            last_first.callback(control.close, run.growth, refuse=refusal)


def _new_folder(
    config: RunConfig, folder: Path, environment: Mapping[str, Any]
) -> tuple[RunStore, list[Tracker]]:
    """Make a run folder, and open what is to follow the run; there is no folder if that fails.

    Raises:
        RunFolderError: The folder holds a run already.
        SettingsError: A tracker cannot be opened.
    """
    before = set(folder.iterdir()) if folder.exists() else None
    try:
        store = RunStore(folder, config=config.model_dump(mode="json"), environment=environment)
        try:
            return store, _trackers(config, folder)
        except BaseException:
            store.close()
            raise
    except RunFolderError:
        raise  # nothing was made
    except BaseException:
        _undo(folder, before)
        raise


def _undo(folder: Path, before: set[Path] | None) -> None:
    """Remove what a run makes in a folder, and the folder too if it was not there."""
    made = {folder / name for name in (*RUN_FILES, *TRACKER_FOLDERS)} - (before or set())
    for path in made:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if before is None:
        with suppress(OSError):  # somebody else has put something there
            folder.rmdir()


def _connection(config: RunConfig) -> BusConnection | None:
    """Return a run's connection with the bus, not open yet; None if it is to have none.

    Raises:
        SettingsError: It cannot be made.
    """
    return BusConnection(config.bus) if config.bus.commands else None


def _trackers(config: RunConfig, folder: Path, after_step: int | None = None) -> list[Tracker]:
    """Open what is to follow a run.

    Raises:
        SettingsError: One cannot be opened.
    """
    chosen = config.model_dump(mode="json")
    try:
        return open_trackers(config.tracking, folder, config=chosen, after_step=after_step)
    except TrackerError as error:
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


def chosen_policy(config: RunConfig) -> Policy:
    """Return the policy that a run names, fresh.

    Raises:
        SettingsError: There is none of that name, or the file holds none that can be used here.
    """
    if config.policy == HeuristicPolicy.name:
        return HeuristicPolicy(config.heuristic)
    if config.policy == UCB1_POLICY:
        return ucb1_policy(config.heuristic)
    if config.policy == DepthSchedulePolicy.name:
        return DepthSchedulePolicy(config.depth_schedule)
    if config.policy == SLOPE:
        return slope_policy(config.depth_schedule)
    try:
        if is_policy_file(config.policy):
            return LearnedPolicy.load(config.policy, random_seed=config.random_seed)
        return named_policy(config.policy, random_seed=config.random_seed)
    except ValueError as error:
        raise SettingsError(str(error)) from error
