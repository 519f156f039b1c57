"""Workers in processes of this machine."""

import os
import queue
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, final

from esper.rl.fragment import Fragment, FragmentOrder
from esper.rl.fragment_worker import CollectionSettings, FragmentWorker, MakeEnv
from esper.rl.workers import RestartingWorkers, WorkerFailure

_THREADS_VARIABLE = "OMP_NUM_THREADS"


class _Worker(NamedTuple):
    process: SpawnProcess
    connection: "Connection[Any, Any]"


@final
class ProcessWorkers(RestartingWorkers):
    """A process each, on one thread.

    One that raises or is killed is noticed at once. They end when this process does, also if it is
    killed. As daemons of `multiprocessing` they cannot have children by it.

    Args:
        make_env: As for `FragmentWorker`; a function or an object of a class at the top level of a
            module that can be imported.
        settings: The same.
        num_workers: How many.
        max_restarts: How often a worker may fail in a row.

    Raises:
        TypeError: `make_env` or a setting cannot be sent to another process.
        OSError: There is no room for another process.
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
        self._workers: dict[int, _Worker] = {}
        super().__init__(num_workers, max_restarts=max_restarts)

    def _start(self, index: int) -> None:
        context = get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _one_thread():
            process.start()
        theirs.close()
        self._workers[index] = _Worker(process, mine)
        try:
            mine.send((self._make_env, self._settings, index))
        except OSError:
            return  # it has died, which its answer tells
        except Exception as error:
            raise TypeError(
                f"{self._make_env!r} cannot be sent to another process: {error}; make environments "
                "by a function or an object of a class at the top level of a module"
            ) from error

    def _ask(self, index: int, order: FragmentOrder) -> None:
        with suppress(OSError):  # it has died, which its answer tells
            self._workers[index].connection.send(order)

    def _next_answer(self, waiting: Collection[int]) -> tuple[int, Fragment | WorkerFailure]:
        by_source: dict[Any, int] = {self._workers[i].connection: i for i in waiting}
        by_source |= {self._workers[i].process.sentinel: i for i in waiting}
        ready = wait(by_source)
        index = by_source[ready[0]]
        process, connection = self._workers[index]
        if connection.poll():
            with suppress(EOFError, OSError):
                answer: Fragment | WorkerFailure = connection.recv()
                return index, answer
        process.kill()  # where only its pipe has ended
        process.join()
        return index, WorkerFailure(problem=_ending(process))

    def _end(self, index: int) -> None:
        worker = self._workers.pop(index, None)
        if worker is not None:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
            worker.process.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that are started compute on one thread: torch asks when it is imported."""
    before = os.environ.get(_THREADS_VARIABLE)
    os.environ[_THREADS_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS_VARIABLE]
        else:
            os.environ[_THREADS_VARIABLE] = before


def _ending(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was killed by signal {-code} ({signal.Signals(-code).name})"


def _serve(connection: "Connection[Any, Any]") -> None:
    """Collect what is ordered, until something raises or the other process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
    try:
        make_env, settings, index = connection.recv()
        orders: queue.SimpleQueue[FragmentOrder] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
        worker = FragmentWorker(make_env, settings, index)
        while True:
            connection.send(worker.collect(orders.get()))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 – an environment may raise anything
        with suppress(OSError):
            connection.send(WorkerFailure.of(error))


def _listen(connection: "Connection[Any, Any]", orders: "queue.SimpleQueue[FragmentOrder]") -> None:
    """Take orders; end the process when there can be none, in the midst of whatever it does."""
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)
