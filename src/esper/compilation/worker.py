"""The process that compiles for another; `main` is all that it runs.

It reads jobs from its standard input, keeps what it has compiled in an artefact store, and answers
on a descriptor of its own, since others print. When the process that has started it ends, it does
too.
"""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from esper.compilation.artefact_store import ArtefactStore
from esper.compilation.compile_job import CompileJob, told
from esper.compilation.inductor_cache import CACHE_VARIABLE, pack
from esper.compilation.pipe import receive_bytes, send, unpack_object
from esper.signing import Keyring

_NICENESS = 10
"""Training goes first."""


class WorkOrder(NamedTuple):
    """A job, and where what comes of it is kept."""

    job: CompileJob
    store: str
    """URL of the artefact store."""
    keys: tuple[bytes, ...]
    folder: str
    """An empty folder to work in; whoever has given the order removes it."""


class WorkDone(NamedTuple):
    """How a job ended."""

    error: str | None
    """None if the artefact is in the store."""


def main() -> None:
    """Work until the standard input ends, which is when the other process does.

    Its arguments are the descriptor to answer on and the other process's module search path, which
    holds from now on.
    """
    _, descriptor, *path = sys.argv
    answers = os.fdopen(int(descriptor), "wb")
    sys.path[:] = path
    os.nice(_NICENESS)
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer.read, orders), daemon=True).start()
    while True:
        send(answers, _work(orders.get()))


def _listen(read: Callable[[int], bytes], orders: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            orders.put(receive_bytes(read))
    finally:
        os.killpg(0, signal.SIGKILL)  # and with it a compiler that was started here


def _work(message: bytes) -> WorkDone:
    try:
        order: WorkOrder = unpack_object(message)
        request = order.job.request
        request.settings.take()
        os.environ[CACHE_VARIABLE] = order.folder
        compiled = order.job.run()
        store = ArtefactStore(order.store, Keyring(order.keys))
        store.save(request, pack(Path(order.folder)), **compiled._asdict())
    except Exception as error:  # noqa: BLE001 – whatever it is, the run goes on without
        return WorkDone(told(error))
    return WorkDone(None)
