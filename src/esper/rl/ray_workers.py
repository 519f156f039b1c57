"""Workers on the machines of a Ray cluster."""

import math
import os
import sys
from collections.abc import Collection
from types import ModuleType
from typing import Any, final

from esper.rl.fragment import Fragment, FragmentOrder
from esper.rl.fragment_worker import CollectionSettings, FragmentWorker, MakeEnv
from esper.rl.workers import RestartingWorkers, WorkerFailure

_NEEDS_RAY = "RayWorkers needs Ray: pip install 'esper-lite[ray]'"
_STORE_BYTES = 256 << 20
"""Of a cluster started here; fragments are small."""


@final
class RayWorkers(RestartingWorkers):
    """A Ray actor each, spread over the nodes.

    One that raises is noticed, and so is one that dies, also with its node. The next one reserves
    nothing, and shares the CPUs of those that are left where there is no room. The nodes need
    esper, and the module of `make_env`, importable.

    Args:
        make_env: As for `FragmentWorker`.
        settings: The same.
        num_workers: How many.
        max_restarts: How often a worker may fail in a row.
        address: Of a cluster, as `ray.init` takes it; None starts one on this machine, which only
            this machine can reach, and stops it in the end. Where this process is connected to one
            already, that one is used.
        cpus_per_worker: What Ray reserves for each, until it is replaced.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: There is no cluster at the address, or it asks for a token.
        ValueError: The cluster has too few CPUs for all.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        settings: CollectionSettings,
        *,
        num_workers: int,
        max_restarts: int = 3,
        address: str | None = None,
        cpus_per_worker: float = 1.0,
    ) -> None:
        self._ray = _imported_ray(local=address is None)
        self._make_env = make_env
        self._settings = settings
        self._reserved: dict[int, float] = dict.fromkeys(range(num_workers), cpus_per_worker)
        self._actors: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}
        self._environment = {"OMP_NUM_THREADS": "1"}
        if address is None:
            self._environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._started_ray = not self._ray.is_initialized()
        cpus = num_workers * cpus_per_worker
        if self._started_ray:
            self._connect(address, cpus)
        found = self._ray.cluster_resources().get("CPU", 0.0)
        if found < cpus:
            self._disconnect()
            raise ValueError(
                f"{num_workers} workers with {cpus_per_worker:g} CPUs each do not fit a cluster of "
                f"{found:g} CPUs; take fewer workers, or a smaller cpus_per_worker"
            )
        super().__init__(num_workers, max_restarts=max_restarts)

    def close(self) -> None:
        super().close()
        self._disconnect()

    def _connect(self, address: str | None, cpus: float) -> None:
        if address is not None:
            try:
                self._ray.init(address=address, log_to_driver=False)
            except ConnectionError as error:
                raise ConnectionError(
                    f"no Ray cluster at {address} lets this process in: {error}; is it up, and if "
                    "it asks for a token, are RAY_AUTH_MODE=token and RAY_AUTH_TOKEN set here too?"
                ) from error
            return
        self._ray.init(
            address="local",
            num_cpus=math.ceil(cpus),
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )

    def _disconnect(self) -> None:
        if self._started_ray:
            self._ray.shutdown()
            self._started_ray = False

    def _start(self, index: int) -> None:
        actor = self._ray.remote(FragmentWorker).options(
            num_cpus=self._reserved.pop(index, 0.0),
            scheduling_strategy="SPREAD",
            max_restarts=0,
            runtime_env={"env_vars": self._environment},
        )
        self._actors[index] = actor.remote(self._make_env, self._settings, index)

    def _ask(self, index: int, order: FragmentOrder) -> None:
        self._answers[index] = self._actors[index].collect.remote(order)

    def _next_answer(self, waiting: Collection[int]) -> tuple[int, Fragment | WorkerFailure]:
        asked = {self._answers[index]: index for index in waiting}
        ready, _ = self._ray.wait(list(asked), num_returns=1)
        index = asked[ready[0]]
        try:
            fragment: Fragment = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:
            problem = f"{type(error.cause).__name__}: {error.cause}"
            return index, WorkerFailure(problem=problem, details=str(error))
        except self._ray.exceptions.RayError as error:
            last = str(error).splitlines()[-1].strip()
            problem = f"{type(error).__name__}: {last}"
            return index, WorkerFailure(problem=problem, details=str(error))
        return index, fragment

    def _end(self, index: int) -> None:
        self._answers.pop(index, None)
        actor = self._actors.pop(index, None)
        if actor is not None:
            self._ray.kill(actor)


def _imported_ray(*, local: bool) -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    if local:  # then it listens on the loopback interface only, on Linux too
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray  # noqa: PLC0415 – an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NEEDS_RAY, name="ray") from error
    return ray
