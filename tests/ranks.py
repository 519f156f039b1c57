"""How the script of one of several processes ends."""

import os
import sys
from collections.abc import Callable

import torch.distributed as dist

from esper.slots.replication import ReplicasDisagreeError


def leave(code: int) -> None:
    """End this process at once.

    Threads of gloo now and then abort one that ends in the usual way (pytorch/pytorch#190489). As
    none does, a process that ends by SIGABRT was amid its work: gloo aborts one that is sent more
    than it expects, which is what two do whose collectives are not the same.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; of several processes, end each by `leave`."""
    try:
        main()
    except Exception as error:
        if not dist.is_initialized():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, ReplicasDisagreeError):
            dist.barrier()  # all have been told, and torchrun kills the others once one has ended
        leave(1)
    if dist.is_initialized():
        dist.barrier()
        leave(0)
