"""The process that compiles for another; `main` is all that it runs.

It reads jobs from its standard input, keeps what it has compiled in an artefact store, and answers
on a descriptor of its own, since others print. When the process that has started it ends, it does
too.
"""

import gc
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from esper.compilation.artefact_store import ArtefactStore
from esper.compilation.compile_job import CompileJob, told
from esper.compilation.inductor_cache import CACHE_VARIABLE, pack
from esper.compilation.pipe import receive_bytes, send, unpack_object
from esper.signing import Keyring

_NICENESS = 10
"""Training goes first."""
_TRITON_VARIABLE = "TRITON_CACHE_DIR"
"""Inductor sets it to a folder in its own, and then keeps to it when that is another one."""


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

    Its arguments are the descriptor to answer on, the folder in which those of its orders are, and
    the other process's module search path, which holds from now on.
    """
    _, descriptor, folder, *path = sys.argv
    answers = os.fdopen(int(descriptor), "wb")
    sys.path[:] = path
    os.nice(_NICENESS)
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    listening = (sys.stdin.buffer.read, orders, folder)
    threading.Thread(target=_listen, args=listening, daemon=True).start()
    while True:
        send(answers, _work(orders.get()))
        _free_device_memory()


def _listen(read: Callable[[int], bytes], orders: "queue.SimpleQueue[bytes]", folder: str) -> None:
    try:
        while True:
            orders.put(receive_bytes(read))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # nobody else does, if the other was killed
        os.killpg(0, signal.SIGKILL)  # and with it a compiler that was started here


def _work(message: bytes) -> WorkDone:
    try:
        order: WorkOrder = unpack_object(message)
        request = order.job.request
        request.settings.take()
        os.environ[CACHE_VARIABLE] = order.folder
        os.environ.pop(_TRITON_VARIABLE, None)
        compiled = order.job.run()
        store = ArtefactStore(order.store, Keyring(order.keys))
        store.save(request, pack(Path(order.folder)), **compiled._asdict())
    except Exception as error:  # noqa: BLE001 – whatever it is, the run goes on without
        return WorkDone(told(error))
    return WorkDone(None)


def _free_device_memory() -> None:
    """Leave a GPU to the other process: the allocator would keep what the largest job has taken."""
    if torch.cuda.is_initialized():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
