"""Processes that make runs, and end with whoever started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

RequestT = TypeVar("RequestT")
RunT = TypeVar("RunT")


class WorkerDiedError(RuntimeError):
    """A process that made a run was ended from outside; what was finished is kept."""


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with this block, and with this process if it is killed."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    others = multiprocessing.active_children()
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    else:
        pool.shutdown()


def make_missing(
    missing: Callable[[], Iterable[RequestT]],
    submit: Callable[[ProcessPoolExecutor, RequestT], Future[RunT]],
    *,
    keep: Callable[[RequestT, RunT], None],
    describe: Callable[[RequestT], str],
    processes: int,
    on_start: Callable[[RequestT], None] = lambda _: None,
) -> None:
    """Make runs until none is missing, and keep each as soon as it ends.

    Args:
        missing: Returns what can be made now, also what is being made.
        submit: Hands a run to the pool.
        keep: Called with every finished run; what is missing may be other runs then.
        describe: Returns a request in words.
        processes: How many runs are made at a time.
        on_start: Called after every start.

    Raises:
        WorkerDiedError: A process was killed, for want of memory perhaps; what was finished is
            kept.
        Exception: What a run raised, after what was finished is kept; its request is in a note.

    Effects: starts processes, and ends them however this ends.
    """
    running: dict[Future[RunT], RequestT] = {}

    def keep_all(ended: Iterable[Future[RunT]]) -> None:
        for future in sorted(ended, key=_failed):  # what is finished comes first
            request = running.pop(future)
            keep(request, _run_of(future, describe(request)))

    with worker_pool(processes) as pool:
        while True:
            waiting = [request for request in missing() if request not in running.values()]
            for request in waiting[: processes - len(running)]:
                try:
                    future = submit(pool, request)
                except BrokenProcessPool as error:  # those under way end now, if none has told yet
                    keep_all(wait(running).done)
                    raise _worker_died(describe(request)) from error
                running[future] = request
                on_start(request)
            if not running:
                return
            keep_all(wait(running, return_when=FIRST_COMPLETED).done)


def _failed(future: Future[RunT]) -> bool:
    return future.exception() is not None


def _run_of(future: Future[RunT], described: str) -> RunT:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _worker_died(described) from error
    except Exception as error:
        error.add_note(f"in the run of {described}")
        raise


def _worker_died(described: str) -> WorkerDiedError:
    return WorkerDiedError(
        f"a process was killed, perhaps for want of memory; the run of {described} was under way. "
        "Start again with the same folder, and with fewer processes, to go on"
    )


def _end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
