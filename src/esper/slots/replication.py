"""Several processes that train one model: what grows after wrapping stays one model, too.

A DDP wrapper averages the gradients of the parameters that it was given. Seeds that grow later are
none of them, and would silently be trained apart; those that were there would be missed by it when
they are pruned. So no wrapper ever gets a seed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.lifecycle.stages import SeedStage
from esper.slots.placement import SLOT_NAME
from esper.slots.slot import SeedSlot

_LEFT_OUT = "_ddp_params_and_buffers_to_ignore"
"""torch's name for what a DDP wrapper of a module leaves out."""

AskedBy = Literal["loop", "clipping", "step"]
"""Who wants gradients to be averaged: the training loop, clipping, or the optimizer's step."""


class ReplicasDisagreeError(RuntimeError):
    """The processes do not hold the same network; nothing was changed."""


class LostReplicaError(RuntimeError):
    """Another process does not answer any more."""


class Replication:
    """The processes that train copies of one model.

    Args:
        group: Of processes; None is all of them.
        sharded: Each process holds a part of it, and something else averages all gradients.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, sharded: bool = False) -> None:
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
        self._sharded = sharded
        self._averaged_by: AskedBy | None = None
        """By whose wish this step's gradients are averaged; None where they are not yet."""
        self._raised: dict[str, str] = {}
        """What living seeds have raised here that not all processes know of, by slot."""
        self._known: set[str] = set()
        """Slots with a failure that all processes know of."""
        self._alarms: list[_Alarm] = []
        """Of the last steps; not looked at yet."""

    def average_gradients(self, slots: Mapping[str, SeedSlot], *, asked_by: AskedBy) -> None:
        """Average the gradients of seeds, and let the other processes know whether one has raised.

        A gradient that one process lacks counts as zero there; one that all lack stays lacking.

        Args:
            slots: By path, the same in every process.
            asked_by: Who asks after another one has, in the same step, changes nothing. Who asks
                again is in another step, as where a loop has left the optimizer's out.

        Raises:
            LostReplicaError: A process has died.

        Effects: waits for the device where this process lacks a gradient, and not otherwise.
        """
        if self._averaged_by in (None, asked_by) and not self._sharded:
            self._averaged_by = asked_by
            self._withhold_failures(slots)
            by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
            for parameter in _learning(slots.values()):
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
            alarms = [self._average(parameters) for parameters in by_dtype.values()]
            if not alarms and any(map(_runs, slots.values())):
                alarms = [self._average([])]
            self._alarms += map(_Alarm, alarms[:1])
        if asked_by == "step":
            self._averaged_by = None

    def _average(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Average gradients, all of one dtype.

        Returns:
            0-dim, not 0 if a seed has raised in any process.
        """
        like = parameters[0] if parameters else torch.empty(0, device=self._device)
        mine = like.new_ones(len(parameters) + 1)  # which have a gradient, and how many have raised
        mine[-1].fill_(len(self._raised))
        lacking = [index for index, one in enumerate(parameters) if one.grad is None]
        for index in lacking:
            mine[index].zero_()
        flat = torch.cat([*map(_flat_gradient, parameters), mine])
        self._reduce(flat, dist.ReduceOp.SUM)
        flat /= self.size
        sizes = [parameter.numel() for parameter in parameters]
        averages: Sequence[Tensor] = flat[: sum(sizes)].split(sizes)
        everyones = flat[sum(sizes) :]
        if lacking:
            anywhere = _read(everyones)
            for index in lacking:
                if anywhere[index]:
                    parameters[index].grad = torch.empty_like(parameters[index])
        for parameter, average in zip(parameters, averages, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(average.view_as(parameter))
        return everyones[-1]

    def end_step(self, slots: Mapping[str, SeedSlot]) -> None:
        """Let a step end, stepped or not, and say in all slots which seeds have raised in any.

        Raises:
            LostReplicaError: A process has died.

        Effects: what a GPU tells is looked at one step later, so that nothing of this step is
        waited for.
        """
        self._averaged_by = None
        if self._sharded:
            return
        self._withhold_failures(slots)
        under_way = [alarm for alarm in self._alarms[-1:] if alarm.under_way]
        arrived = self._alarms[: len(self._alarms) - len(under_way)]
        self._alarms = under_way
        if any(alarm.rings() for alarm in arrived):
            self.share_failures(slots)

    def share_failures(self, slots: Mapping[str, SeedSlot]) -> None:
        """Say in all slots of every process which seeds have raised in any of them.

        Raises:
            LostReplicaError: A process has died.
        """
        self._withhold_failures(slots)
        mine = bytearray(json.dumps(self._raised).encode())
        self._raised, self._alarms = {}, []
        for rank, data in enumerate(self.gather(torch.frombuffer(mine, dtype=torch.uint8))):
            for path, error in json.loads(bytes(data.tolist())).items():
                slots[path].note_failure(f"{error} (in process {rank})")
                self._known.add(path)

    def all_know_failure(self, path: str) -> bool:
        """Return whether what a slot's seed has raised is known in all processes."""
        return path in self._known

    def forget_failure(self, path: str) -> None:
        """Forget what a seed has raised that lives in its slot no more."""
        self._raised.pop(path, None)
        self._known.discard(path)

    def start_anew(self) -> None:
        """Forget the step that was under way, in every process."""
        self._averaged_by, self._raised, self._known, self._alarms = None, {}, set(), []

    def _withhold_failures(self, slots: Mapping[str, SeedSlot]) -> None:
        """Keep slots from acting on what their seeds have raised before all processes know."""
        for path, slot in slots.items():
            error = slot.withhold_failure()
            if error is not None:
                self._raised.setdefault(path, error)
                self._known.discard(path)

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


class _Alarm:
    """Whether a seed has raised in any process, on its way from the device.

    Args:
        told: Not 0 if so, 0-dim.
    """

    def __init__(self, told: Tensor) -> None:
        self._arrives: torch.cuda.Event | None = None
        if told.is_cuda:
            self._told = told.to("cpu", non_blocking=True)
            self._arrives = torch.cuda.current_stream(told.device).record_event()
        else:
            self._told = told.to("cpu", copy=True)

    @property
    def under_way(self) -> bool:
        """Whether reading it at once would wait."""
        return self._arrives is not None

    def rings(self) -> bool:
        """Return whether it is so; waits until what was asked has arrived."""
        if self._arrives is not None:
            self._arrives.synchronize()
        return bool(self._told)


def _learning(slots: Iterable[SeedSlot]) -> Iterable[nn.Parameter]:
    """Return the parameters of seeds that have a gradient where their module has run."""
    for slot in slots:
        for branch in slot.branches:
            if branch is not slot.living or (_runs(slot) and not slot.frozen):
                yield from (one for one in branch.parameters() if one.requires_grad)


def _runs(slot: SeedSlot) -> bool:
    return slot.living is not None and slot.stage is not SeedStage.GERMINATED


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)


def _read(told: Tensor) -> list[float]:
    """Return numbers from the device; waits for it."""
    values: list[float] = told.tolist()
    return values


def keep_out_of_wrappers(model: nn.Module, seeds: Iterable[nn.Module]) -> None:
    """Let a DDP wrapper of a model leave out some modules of it; `SlotSet` says why."""
    inside = {id(part) for seed in seeds for part in seed.modules()}
    grown = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        if id(part) in inside
        for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    ]
    if grown:
        known = getattr(model, _LEFT_OUT, [])
        names = type(known)(dict.fromkeys((*known, *grown)))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # noqa: SLF001
            model, names
        )


def let_wrappers_in(module: nn.Module) -> None:
    """Forget which parts of slots a wrapper leaves out, in a module that has no slots any more."""
    names = vars(module).get(_LEFT_OUT, [])
    own = [name for name in names if SLOT_NAME not in name.split(".")]
    if len(own) == len(names):
        return
    delattr(module, _LEFT_OUT)
    if own:  # the user's
        setattr(module, _LEFT_OUT, type(names)(own))


def rename_left_out(model: nn.Module, path: str, inner: str) -> None:
    """Let the names of what a wrapper leaves out follow a module that was put into another one.

    Args:
        model: That will be wrapped.
        path: Of the outer one, which the module had; empty where it is the model's.
        inner: Name of the module in it.
    """
    names = vars(model).get(_LEFT_OUT, [])
    if names:
        prefix = f"{path}." if path else ""
        renamed = (
            f"{prefix}{inner}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
            for name in names
        )
        setattr(model, _LEFT_OUT, type(names)(renamed))
