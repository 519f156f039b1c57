"""A run that keeps itself in a folder, and goes on from there."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from esper.experiments.config import RunConfig
from esper.experiments.parts import (
    checkpoints_in,
    compile_service,
    connection_with_bus,
    opened_trackers,
)
from esper.experiments.run import GrowingRun, prepare
from esper.lifecycle.events import RunFailed
from esper.tasks.task import TaskSetup
from esper.telemetry.environment import describe_environment
from esper.telemetry.heartbeat import Heartbeat
from esper.telemetry.run_folder import (
    CHECKPOINTS_FOLDER,
    GROWN_FOLDER,
    RUN_FILES,
    RunFolderError,
    RunStatus,
)
from esper.telemetry.run_reader import RunReader
from esper.telemetry.run_store import ReopenedRunStore, RunStore, check_own, check_unfinished
from esper.telemetry.sink import Sink
from esper.telemetry.tracking import TRACKER_FOLDERS
from esper.training.checkpoints import CheckpointError, Checkpoints, FoundCheckpoint
from esper.training.control import RunControl, RunStoppedError
from esper.training.precision import matmul_settings, set_matmul_precision
from esper.training.sealed_folder import DamagedFolderError, check_replaceable
from esper.training.trainer import Trainer


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
        RunFolderError: The folder holds a run already, or checkpoints of another one, which would
            be gone on from, or what the grown network cannot replace.
        SettingsError: As `prepare`, compiled graphs cannot be kept, the bus is set wrongly, or a
            tracker cannot be opened.
        CheckpointError: Checkpoints cannot be written.
        In each case nothing is left in the folder that was not there.
    """
    _set_process(config)
    environment = {
        **describe_environment(torch.device(config.device)),
        "matmul": matmul_settings(),
        "random_seed": config.random_seed,
        "data_notes": list(setup.notes),
    }
    with compile_service(config.compile) as service:
        run = prepare(config, setup=setup, service=service)
        run.connection = connection_with_bus(config)
        store = _new_folder(run, config, folder, environment)
        with _in_folder(run, store, sinks, after_step=-1):
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
    steps after the checkpoint is forgotten, once nothing is left that could be refused: after an
    error before the block the run stands as it did.

    Raises:
        RunFolderError: It is no run folder or a mirror, the run is finished, a process writes it,
            or it holds what the grown network cannot replace.
        CheckpointError: Every checkpoint is damaged, or of another version; or something is not as
            it was then, as the task's host.
        BlueprintError: A blueprint that has grown is not registered here.
        SettingsError: As `prepare`, the bus is set wrongly, or a tracker cannot be opened.
        TaskDataError: The data cannot be read or used any more.
        ModuleNotFoundError: The task needs an extra that is not installed.
    """
    reader = RunReader(folder)
    check_own(reader)
    check_unfinished(reader)
    config = RunConfig.model_validate(reader.config())
    _set_process(config)
    with compile_service(config.compile) as service:
        run = prepare(config, service=service)
        store = ReopenedRunStore(folder, after_step=None, unfinished=True)
        after_step = _go_on(run, store, config)
        with _in_folder(run, store, sinks, after_step=after_step):
            if run.resumed is not None:
                run.growth.publish(run.resumed.events)
            yield run


def _go_on(run: GrowingRun, store: ReopenedRunStore, config: RunConfig) -> int:
    """Bring a run to its newest checkpoint, and its folder last: it is closed if any is refused.

    Returns:
        The last step that the run knows of; -1 if there is no checkpoint.
    """
    with ExitStack() as refused:
        refused.callback(store.close)
        _check_room(store.folder)
        checkpoints = checkpoints_in(config.checkpoint, store.folder)
        found = checkpoints.newest() if checkpoints is not None and checkpoints.names() else None
        if found is not None:
            _give(found, run.trainer)
        after_step = -1 if found is None else found.info.step
        run.trainer.keeper, run.resumed = checkpoints, found
        run.connection = connection_with_bus(config)
        if run.connection is not None:
            refused.callback(run.connection.close, "failed")
        run.trackers = opened_trackers(config, store.folder, after_step=after_step)
        for tracker in run.trackers:
            refused.callback(tracker.close, "failed")
        store.go_on(after_step, after_epoch=run.growth.epoch)
        refused.pop_all()
    return after_step


def _give(found: FoundCheckpoint, trainer: Trainer) -> None:
    """Let a run go on from a checkpoint.

    Raises:
        CheckpointError: Something is not as it was then, as the file of a learned policy.
    """
    try:
        found.give_to(trainer)
    except ValueError as error:
        raise CheckpointError(f"the run cannot go on from {found.name}: {error}") from error


def _set_process(config: RunConfig) -> None:
    set_matmul_precision(config.trainer.matmul_precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)


@contextmanager
def _in_folder(
    run: GrowingRun, store: RunStore, sinks: Sequence[Sink], *, after_step: int
) -> Iterator[None]:
    """Let a run write into its folder, and close it with a status however the run ends."""
    run.growth.sinks.extend([store, *run.trackers, *sinks])
    if after_step >= 0:
        run.growth.sink_guard.go_on()
    run.grown_folder = store.folder / GROWN_FOLDER
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
        elif isinstance(error, Exception):
            run.growth.publish([RunFailed(error=f"{type(error).__name__}: {error}")])
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
    if run.resumed is not None and run.resumed.state["control"] is not None:
        control.load_state_dict(run.resumed.state["control"])
    if connection is None:
        control.paused = False  # nobody could end it
        return
    connection.open(RunReader(store.folder), run.growth, control, after_step=after_step)
    if after_step >= 0:
        run.growth.sink_guard.go_on()


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
    run: GrowingRun, config: RunConfig, folder: Path, environment: Mapping[str, Any]
) -> RunStore:
    """Make a run folder, and open what keeps and follows the run; nothing is made if that fails.

    Raises:
        RunFolderError: The folder holds a run already, or what is in the way of one.
        CheckpointError: Checkpoints cannot be written.
        SettingsError: A tracker cannot be opened.
    """
    before = contents(folder)
    with ExitStack() as refused:
        refused.callback(undo, folder, before)
        try:
            store = RunStore(folder, config=config.model_dump(mode="json"), environment=environment)
        except RunFolderError:
            refused.pop_all()  # nothing was made, and what is there may be another process's
            raise
        refused.callback(store.close)
        _check_room(folder)
        run.trainer.keeper = _new_checkpoints(config, folder)
        run.trackers = opened_trackers(config, folder)
        refused.pop_all()
    return store


def _check_room(folder: Path) -> None:
    """Raise a `RunFolderError` if a run folder holds what its grown network cannot replace."""
    try:
        check_replaceable(folder / GROWN_FOLDER)
    except (DamagedFolderError, FileExistsError) as error:
        raise RunFolderError(f"there is no room for the grown network: {error}") from error


def _new_checkpoints(config: RunConfig, folder: Path) -> Checkpoints | None:
    """Return where a run that begins keeps its checkpoints; None if it is to keep none.

    Raises:
        RunFolderError: There are some of another run.
        CheckpointError: They cannot be written.
    """
    checkpoints = checkpoints_in(config.checkpoint, folder)
    left = [] if checkpoints is None else checkpoints.names()
    if checkpoints is not None and left:
        raise RunFolderError(
            f"{checkpoints.folder} holds {left[-1]} of another run, which esper resume would go on "
            "from; choose another folder, or remove that one"
        )
    return checkpoints


def contents(folder: Path) -> set[Path] | None:
    """Return what is in a folder before a run begins there; None if there is no folder."""
    return set(folder.iterdir()) if folder.exists() else None


def undo(folder: Path, before: set[Path] | None) -> None:
    """Remove what a run makes in a folder, and the folder too if it was not there."""
    names = (*RUN_FILES, *TRACKER_FOLDERS, CHECKPOINTS_FOLDER)
    made = {folder / name for name in names} - (before or set())
    for path in made:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if before is None:
        with suppress(OSError):  # somebody else has put something there
            folder.rmdir()
