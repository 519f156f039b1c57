"""What a run has cost: operations and seconds, training apart from evaluating and deciding."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.slots.nested import tensors_in
from esper.slots.slot_set import SlotSet

_NOT_COUNTED = nullcontext()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something has cost.

    Attributes:
        flops: Floating-point operations; None where they are not counted.
        seconds: Wall time.
    """

    flops: int | None
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        """Return both together; unknown with unknown operations."""
        known = self.flops is not None and other.flops is not None
        flops = (self.flops or 0) + (other.flops or 0) if known else None
        return Cost(flops=flops, seconds=self.seconds + other.seconds)


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a run has spent so far.

    Attributes:
        training: Forwards, backwards and optimizer steps, of seeds too that were pruned later.
        evaluation: The plain evaluations of the growing network, one per decision.
        decision: All else that growth takes: probes, isolation checks, building seeds, the policy.
            On a GPU seconds go to what waits for the device.
    """

    training: Cost
    evaluation: Cost
    decision: Cost

    @property
    def total(self) -> Cost:
        """All of it."""
        return self.training + self.evaluation + self.decision


class _Purpose(Enum):
    TRAINING = 0
    EVALUATION = 1
    DECISION = 2


class CostMeter:
    """Measures what training costs while it goes on.

    Operations are counted by torch's `FlopCounterMode`: matrix products, convolutions and
    attention, a multiplication and an addition each one operation; elementwise work counts as none.
    A step is counted the first time that a structure meets batches of a shape, and has the same
    figure from then on; what a decision does is counted each time. Counting changes no result, but
    that a step that is counted runs eagerly, and so may round otherwise than a compiled one.

    Args:
        slots: Whose structure a step depends on.
        count_flops: Whether operations are counted, or seconds alone.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        slots: SlotSet,
        *,
        count_flops: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._slots = slots
        self._count = count_flops
        self._clock = clock
        self._known: dict[Hashable, int] = {}
        self._flops = dict.fromkeys(_Purpose, 0)
        self._seconds = dict.fromkeys(_Purpose, 0.0)
        self._purpose = _Purpose.TRAINING
        self._mark: float | None = None

    @property
    def cost(self) -> RunCost:
        """What has been spent so far."""
        costs = {
            purpose: Cost(
                flops=self._flops[purpose] if self._count else None, seconds=self._seconds[purpose]
            )
            for purpose in _Purpose
        }
        return RunCost(
            training=costs[_Purpose.TRAINING],
            evaluation=costs[_Purpose.EVALUATION],
            decision=costs[_Purpose.DECISION],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what has been spent so far."""
        self._take_time()
        return {
            purpose.name: {"flops": self._flops[purpose], "seconds": self._seconds[purpose]}
            for purpose in _Purpose
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self._flops = {purpose: state[purpose.name]["flops"] for purpose in _Purpose}
        self._seconds = {purpose: state[purpose.name]["seconds"] for purpose in _Purpose}

    def start(self) -> None:
        """Begin to take the time, unless it is taken; what came before was setting up."""
        if self._mark is None:
            self._mark = self._clock()

    def stop(self) -> None:
        """Take the time up to now, and none until `start`."""
        self._take_time()
        self._mark = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no time inside the block, and go on after it if time was taken before."""
        running = self._mark is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def batch(self, batch: Any) -> AbstractContextManager[None]:
        """Count a batch's forward and backward.

        Args:
            batch: Its tensors' shapes, with the slots' structure, are what the count depends on.
        """
        if not self._count:
            return _NOT_COUNTED
        return self._counted("batch", tuple(tensor.shape for tensor in tensors_in(batch)))

    def optimizer_step(self) -> AbstractContextManager[None]:
        """Count an optimizer's step: nothing for elementwise ones, matrix products for others.

        One that is skipped, as GradScaler does, costs nothing.
        """
        return self._optimizer_step() if self._count else _NOT_COUNTED

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Count what is done in order to decide, and take its time apart."""
        with self._apart(_Purpose.DECISION):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Count a plain evaluation, and take its time apart; inside a decision it is none of it."""
        with self._apart(_Purpose.EVALUATION):
            yield

    @contextmanager
    def _apart(self, purpose: "_Purpose") -> Iterator[None]:
        self._take_time()
        around, self._purpose = self._purpose, purpose
        counter = flop_counter() if self._count else None
        try:
            with counter or nullcontext():
                yield
        finally:
            self._take_time()
            self._purpose = around
            if counter is not None:
                spent = counter.get_total_flops()
                self._flops[purpose] += spent
                if around is not _Purpose.TRAINING:  # its own counter has seen them too
                    self._flops[around] -= spent

    def _take_time(self) -> None:
        if self._mark is not None:
            now = self._clock()
            self._seconds[self._purpose] += now - self._mark
            self._mark = now

    @contextmanager
    def _optimizer_step(self) -> Iterator[None]:
        key, binding = (self._slots.structure(), "optimizer"), self._slots.binding
        known = self._known.get(key)
        with self._counted("optimizer"):
            yield
        if binding is not None and not binding.has_stepped:
            self._flops[_Purpose.TRAINING] -= self._known[key]
            if known is None:
                del self._known[key]

    def _counted(self, *what: Hashable) -> AbstractContextManager[None]:
        """Count something that costs the same each time; what is known is added up at once."""
        key = (self._slots.structure(), *what)
        known = self._known.get(key)
        if known is None:
            return self._counted_first(key)
        self._flops[_Purpose.TRAINING] += known
        return _NOT_COUNTED

    @contextmanager
    def _counted_first(self, key: Hashable) -> Iterator[None]:
        # What compiled code does cannot be counted.
        with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
            yield
        self._known[key] = counter.get_total_flops()
        self._flops[_Purpose.TRAINING] += self._known[key]


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, with the attention that torch runs on a CPU counted as on a GPU."""
    return FlopCounterMode(display=False, custom_mapping=dict(_CPU_ATTENTION))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the operations of softmax(Q Kᵀ) V; a causal mask saves none, as in torch's formula."""
    batch, heads, queries, head_dim = query
    keys, value_dim = key[2], value[3]
    return 2 * int(batch * heads * queries * keys * (head_dim + value_dim))


def _attention_backward_flops(
    _gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """Return the operations of attention's backward, scores recomputed, as in torch's formula."""
    batch, heads, queries, head_dim = query
    keys, value_dim = key[2], value[3]
    return 2 * int(batch * heads * queries * keys * (3 * head_dim + 2 * value_dim))


_CPU_ATTENTION_NAME = "_scaled_dot_product_flash_attention_for_cpu"
_CPU_ATTENTION: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        getattr(torch.ops.aten, _CPU_ATTENTION_NAME): _attention_flops,
        getattr(torch.ops.aten, f"{_CPU_ATTENTION_NAME}_backward"): _attention_backward_flops,
    }
)
"""torch 2.13 has no formula for these two: without them attention on a CPU would cost nothing."""
