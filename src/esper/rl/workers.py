"""Workers that collect fragments side by side, and are started again when they fail."""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, final

from esper.rl.fragment import Fragment, FragmentOrder
from esper.rl.fragment_worker import CollectionSettings, FragmentWorker, MakeEnv


class WorkersFailedError(RuntimeError):
    """A worker failed as often as it may; notes have the traceback of its last error."""


class Workers(Protocol):
    """Collect a fragment each, wherever they run."""

    @property
    def num_workers(self) -> int:
        """How many there are."""

    @property
    def problems(self) -> Sequence[str]:
        """Why workers were started again, in order."""

    def collect_all(self, order: FragmentOrder) -> Sequence[Fragment]:
        """Return a fragment of each worker, by index.

        Raises:
            WorkersFailedError: One failed too often in a row; all are closed.
        """

    def close(self) -> None:
        """End them, whatever they do; calling it again does nothing."""


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """Why a worker has no fragment, in one line, and the traceback where there is one."""

    problem: str
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> "WorkerFailure":
        """Return what is to be told of an error that was just raised."""
        return cls(
            problem=f"{type(error).__name__}: {error}",
            details="".join(traceback.format_exception(error)),
        )


class RestartingWorkers(ABC):
    """Has a fragment that failed collected anew, by a new worker in the old one's place.

    Steps and episodes of the failed attempt are lost, and the new one begins with another random
    seed: what one seed brings about does not happen forever.

    Args:
        num_workers: How many.
        max_restarts: How often a worker may fail in a row.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(self, num_workers: int, *, max_restarts: int) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, got {max_restarts}")
        self.num_workers = num_workers
        self.problems: list[str] = []
        """Why workers were started again, in order."""
        self._max_restarts = max_restarts
        self._closed = False
        try:
            for index in range(num_workers):
                self._start(index)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def collect_all(self, order: FragmentOrder) -> list[Fragment]:
        """Return a fragment of each worker, by index.

        Raises:
            WorkersFailedError: One failed too often in a row; all are closed.
            RuntimeError: They were closed.
        """
        if self._closed:
            raise RuntimeError("the workers are closed; make new ones")
        try:
            return self._collect_all(order)
        except BaseException:  # none may answer to what nobody waits for any more
            self.close()
            raise

    def close(self) -> None:
        """End them, whatever they do; calling it again does nothing."""
        self._closed = True
        for index in range(self.num_workers):
            self._end(index)

    def _collect_all(self, order: FragmentOrder) -> list[Fragment]:
        waiting = dict.fromkeys(range(self.num_workers), order)
        fragments: dict[int, Fragment] = {}
        for index in waiting:
            self._ask(index, order)
        while waiting:
            index, answer = self._next_answer(waiting)
            if isinstance(answer, Fragment):
                fragments[index] = answer
                del waiting[index]
                continue
            failed = waiting[index]
            self._check_attempts(index, failed, answer)
            self.problems.append(f"worker {index}: {answer.problem}")
            waiting[index] = replace(failed, attempt=failed.attempt + 1)
            self._end(index)
            self._start(index)
            self._ask(index, waiting[index])
        return [fragments[index] for index in sorted(fragments)]

    def _check_attempts(self, index: int, order: FragmentOrder, failure: WorkerFailure) -> None:
        if order.attempt < self._max_restarts:
            return
        error = WorkersFailedError(
            f"worker {index} failed {order.attempt + 1} times in a row at fragment {order.number} "
            f"of {order.num_steps} steps; the last time: {failure.problem}"
        )
        if failure.details:
            error.add_note(failure.details)
        raise error

    @abstractmethod
    def _start(self, index: int) -> None:
        """Start a worker; there is none of this index."""

    @abstractmethod
    def _ask(self, index: int, order: FragmentOrder) -> None:
        """Let a worker collect; that it is dead, its answer tells."""

    @abstractmethod
    def _next_answer(self, waiting: Collection[int]) -> tuple[int, Fragment | WorkerFailure]:
        """Wait for one of these to answer, or to die."""

    @abstractmethod
    def _end(self, index: int) -> None:
        """End a worker if there is one of this index."""


@final
class InProcessWorkers(RestartingWorkers):
    """Play one after another in this process: for small environments, and to debug one.

    Args:
        make_env: As for `FragmentWorker`.
        settings: The same.
        num_workers: How many.
        max_restarts: How often a worker may fail in a row.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        settings: CollectionSettings,
        *,
        num_workers: int,
        max_restarts: int = 3,
    ) -> None:
        self._make_env = make_env
        self._settings = settings
        self._workers: dict[int, FragmentWorker] = {}
        self._asked: dict[int, FragmentOrder] = {}
        super().__init__(num_workers, max_restarts=max_restarts)

    def _start(self, index: int) -> None:
        """Nothing: what fails in making an environment is to count as its failure."""

    def _ask(self, index: int, order: FragmentOrder) -> None:
        self._asked[index] = order

    def _next_answer(self, waiting: Collection[int]) -> tuple[int, Fragment | WorkerFailure]:
        index = min(waiting)
        try:
            if index not in self._workers:
                self._workers[index] = FragmentWorker(self._make_env, self._settings, index)
            return index, self._workers[index].collect(self._asked[index])
        except Exception as error:  # noqa: BLE001 – an environment may raise anything
            return index, WorkerFailure.of(error)

    def _end(self, index: int) -> None:
        worker = self._workers.pop(index, None)
        if worker is not None:
            worker.close()
