"""The training of a policy that keeps itself in a folder, and goes on from there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esper.experiments.parts import usable_device
from esper.experiments.stored_run import contents, undo
from esper.rl.demonstrations import NotImitableError
from esper.rl.fragment_worker import CollectionSettings
from esper.rl.learner_state import LearnerStates
from esper.rl.masked_policy import MaskedRecurrentPolicy
from esper.rl.policy_run import MakeGrowthEnv, PolicyRun
from esper.rl.policy_run_config import PolicyRunConfig, policy_run_config
from esper.rl.policy_training import PolicyTraining
from esper.rl.process_workers import ProcessWorkers
from esper.rl.ray_workers import RayWorkers
from esper.rl.task_runs import check_policy
from esper.rl.workers import Workers
from esper.telemetry.environment import describe_environment
from esper.telemetry.run_folder import RunStatus
from esper.telemetry.run_kind import POLICY_TRAINING
from esper.telemetry.run_store import ReopenedRunStore, RunStore
from esper.telemetry.sink import Sink

STATES_FOLDER = "learner"

_BEFORE_ALL_STEPS = -1


@contextmanager
def new_policy_run(
    config: PolicyRunConfig, folder: Path, sinks: Sequence[Sink] = ()
) -> Iterator[PolicyRun]:
    """Open a training in a new folder, and close it with a status however it ends.

    Raises:
        RunFolderError: The folder holds a run already.
        SettingsError, TaskDataError, ModuleNotFoundError: The task's runs cannot be made, there is
            no policy to imitate or its settings are not for the task's host, no such device, or no
            Ray; there is no folder then.
        ValueError: The host has no slot, no blueprint fits one, or the Ray cluster is too small;
            there is no folder then.
        ConnectionError: There is no Ray cluster at the address; there is no folder then.
        NotImitableError: The policy to imitate, which plays then, takes actions that the heads do
            not offer, or none of its runs is whole; there is no folder any more.
    """
    if config.demonstrations is not None:
        check_policy(config.demonstrations.policy, config.run)
    device = usable_device(config.training.device)
    options = _options(config)
    before = contents(folder)
    with _workers(config, options) as workers:
        store = RunStore(
            folder,
            config=_for_viewers(config),
            environment={
                **describe_environment(device),
                "random_seed": config.training.random_seed,
            },
        )
        try:
            with _in_folder(config, store, workers, options, sinks) as run:
                yield run
        except NotImitableError:  # nothing was learned, nothing can go on
            undo(folder, before)
            raise


@contextmanager
def resumed_policy_run(
    folder: Path, sinks: Sequence[Sink] = (), *, total_steps: int | None = None
) -> Iterator[PolicyRun]:
    """Go on with a training that was stopped, from its newest state that is whole.

    One that was stopped before it kept a state begins anew, demonstrations included.

    Args:
        folder: Of the training.
        sinks: Receive every further event and metric, besides the folder.
        total_steps: Up to where; None is as it was begun.

    Raises:
        RunFolderError: It is no folder of a run, or another process writes it.
        SettingsError: It holds no training of a policy, or the task's runs cannot be made.
        LearnerStateError: No state that it kept is whole.
        ValueError: The state was kept with other settings, or is of another policy; the folder
            stays as it was then.
        NotImitableError: As `new_policy_run`; the folder stays.
    """
    config = policy_run_config(folder, total_steps=total_steps)
    usable_device(config.training.device)
    options = _options(config)
    with _workers(config, options) as workers:
        has_learned = bool(LearnerStates(folder / STATES_FOLDER).names())
        store = ReopenedRunStore(folder, after_step=None)

        def go_on(training: PolicyTraining) -> int | None:
            resumed_at = training.resume() if has_learned else None
            store.go_on(_BEFORE_ALL_STEPS if resumed_at is None else resumed_at)
            return resumed_at

        with _in_folder(config, store, workers, options, sinks, go_on=go_on) as run:
            yield run


def _options(config: PolicyRunConfig) -> dict[str, Any]:
    """Return what the policy's class is told, of the task's host."""
    with _threads_put_back():
        env = MakeGrowthEnv(config.unreferenced)()
    blueprints = env.coder.blueprints
    env.close()
    return {"blueprints": blueprints, "choices": config.actions, "network": config.network}


def _settings(config: PolicyRunConfig, options: Mapping[str, Any]) -> CollectionSettings:
    return config.training.collection(MaskedRecurrentPolicy, options)


@contextmanager
def _workers(config: PolicyRunConfig, options: Mapping[str, Any]) -> Iterator[Workers]:
    settings, number = _settings(config, options), config.training.num_workers
    make_env = MakeGrowthEnv(config)
    workers: Workers
    if config.ray is None:
        workers = ProcessWorkers(make_env, settings, num_workers=number)
    else:
        address = None if config.ray == "local" else config.ray
        workers = RayWorkers(make_env, settings, num_workers=number, address=address)
    try:
        with _threads_put_back():
            yield workers
    finally:
        workers.close()


@contextmanager
def _threads_put_back() -> Iterator[None]:
    """Undo what making environments, and playing them here, does to the number of threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _in_folder(
    config: PolicyRunConfig,
    store: RunStore,
    workers: Workers,
    options: Mapping[str, Any],
    sinks: Sequence[Sink],
    *,
    go_on: Callable[[PolicyTraining], int | None] | None = None,
) -> Iterator[PolicyRun]:
    """Make a training that writes into its folder, and close that however it ends.

    `go_on` gives it what was learned before, and returns its timesteps; where that raises, the
    folder's status stays.
    """
    everything = [store, *sinks]
    status: RunStatus = "failed"
    run: PolicyRun | None = None
    begun = go_on is None
    try:
        training = PolicyTraining(
            config.training,
            _settings(config, options),
            MakeGrowthEnv(config.unreferenced),
            workers,
            sinks=everything,
            keep=store.folder / STATES_FOLDER,
        )
        resumed_at = None if go_on is None else go_on(training)
        begun = True
        run = PolicyRun(
            config=config,
            folder=store.folder,
            training=training,
            workers=workers,
            sinks=everything,
            resumed_at=resumed_at,
        )
        yield run
        status = "finished" if run.finished else "interrupted"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        if run is not None:
            run.tell_failure(error)
        raise
    finally:
        if begun:
            store.set_status(status)
        store.close()


def _for_viewers(config: PolicyRunConfig) -> dict[str, Any]:
    """Return settings with what every viewer of run folders looks for."""
    return {
        "task": config.run.task,
        "policy": "being learned",
        "random_seed": config.training.random_seed,
        "learning_rate": config.training.learning_rate,
        POLICY_TRAINING: config.model_dump(mode="json"),
    }
