"""Several processes that train one model: what grows after wrapping stays one model, too.

A DDP wrapper averages the gradients of the parameters that it was given. Seeds that grow later are
none of them, and would silently be trained apart; those that were there would be missed by it when
they are pruned. So no wrapper ever gets a seed.
"""

import hashlib
import json
from collections.abc import Hashable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.slots.sharded import is_sharded


class ReplicasDisagreeError(RuntimeError):
    """The processes do not hold the same network; nothing was changed."""


class LostReplicaError(RuntimeError):
    """Another process does not answer any more."""


class Replication:
    """The processes that train copies of one model.

    Args:
        group: Of processes; None is all of them.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised; call init_process_group first, as scripts "
                "that torchrun starts do"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda" if nccl else "cpu")
        """Where what is not of the model is exchanged."""
        self._structure: Hashable = None
        self._shared: list[int] = []
        """Which of the seeds' parameters have a gradient in any process."""

    def average_gradients(self, parameters: Iterable[nn.Parameter], *, structure: Hashable) -> None:
        """Average gradients over the processes, but for those of sharded parameters.

        A gradient that one process lacks counts as zero there; one that all lacked in the first
        step of a structure stays lacking.

        Args:
            parameters: The same in every process, in the same order.
            structure: Of the network. Waits for the device where it is another one than before, and
                not otherwise.

        Raises:
            LostReplicaError: A process has died.
        """
        ours = [p for p in parameters if p.requires_grad and not is_sharded(p)]
        if not ours:
            return
        if structure != self._structure:
            has = torch.tensor([p.grad is not None for p in ours], dtype=torch.int32)
            has = has.to(self._device)
            self._reduce(has, dist.ReduceOp.MAX)
            self._shared, self._structure = has.tolist(), structure
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter, shared in zip(ours, self._shared, strict=True):
            if shared:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._reduce(flat, dist.ReduceOp.SUM)
            flat /= self.size
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def from_first(self, value: Any) -> Any:
        """Return the first process's value, of anything that JSON can hold, in every process.

        Raises:
            LostReplicaError: A process has died.
        """
        text = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self._device)
        self._broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        if self.rank == 0:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._broadcast(data)
        return json.loads(bytes(data.tolist()))

    def gather(self, data: Tensor) -> list[Tensor]:
        """Return every process's bytes, by rank, in every process.

        Args:
            data: Of any length, uint8, shape `N`, on the CPU.

        Raises:
            LostReplicaError: A process has died.
        """
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        sizes = [int(one) for one in self._gathered(size)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self._device)
        padded[: len(data)] = data
        everyones = self._gathered(padded)
        return [one[:length].cpu() for one, length in zip(everyones, sizes, strict=True)]

    def largest(self, mine: int) -> int:
        """Return the largest of all processes' numbers.

        Raises:
            LostReplicaError: A process has died.
        """
        told = torch.tensor([mine], device=self._device, dtype=torch.int64)
        self._reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def any(self, mine: bool) -> bool:
        """Return whether it is so in any process.

        Raises:
            LostReplicaError: A process has died.
        """
        return bool(self.largest(int(mine)))

    def check_equal(self, what: str, value: Any) -> None:
        """Raise in every process unless all of them have the same value.

        Args:
            what: Names it in the error.
            value: Anything that JSON can hold.

        Raises:
            ReplicasDisagreeError: They differ.
            LostReplicaError: A process has died.
        """
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:7]
        mine = torch.tensor([int.from_bytes(digest)], dtype=torch.int64, device=self._device)
        hashes = [int(one) for one in self._gathered(mine)]
        if len(set(hashes)) > 1:
            usual = max(set(hashes), key=hashes.count)
            others = [rank for rank, one in enumerate(hashes) if one != usual]
            raise ReplicasDisagreeError(
                f"{what} is not the same in all {self.size} processes: rank "
                f"{', '.join(map(str, others))} differs. Nothing was changed; start all of them "
                "from the same checkpoint, with the same code and settings"
            )

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        everyones = [torch.zeros_like(mine) for _ in range(self.size)]
        self._told(lambda: dist.all_gather(everyones, mine, group=self.group))
        return everyones

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        self._told(lambda: dist.all_reduce(tensor, op=operation, group=self.group))

    def _broadcast(self, tensor: Tensor) -> None:
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        self._told(lambda: dist.broadcast(tensor, src=first, group=self.group))

    def _told(self, collective: Any) -> None:
        try:
            collective()
        except (RuntimeError, dist.DistBackendError) as error:
            raise LostReplicaError(
                f"rank {self.rank} of {self.size} waits for a process that does not answer: {error}"
            ) from error


def keep_out_of_wrappers(model: nn.Module, seeds: Iterable[nn.Module]) -> None:
    """Let a DDP wrapper of a model leave out some modules of it; `SlotSet` says why."""
    ignoring = "_ddp_params_and_buffers_to_ignore"
    inside = {id(part) for seed in seeds for part in seed.modules()}
    grown = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        if id(part) in inside
        for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    ]
    names = [*getattr(model, ignoring, ()), *grown]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # noqa: SLF001
        model, list(dict.fromkeys(names))
    )
