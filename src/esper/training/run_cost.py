"""What a run has cost: floating-point operations and seconds, training apart from deciding."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.slots.nested import tensors_in
from esper.slots.slot_set import SlotSet


@dataclass(kw_only=True)
class RunCost:
    """What has been spent so far.

    Attributes:
        training_flops: Of forwards, backwards and optimizer steps, seeds included that were pruned
            later; None where they are not counted.
        decision_flops: Of isolation checks, evaluations, probes, building seeds and the policy;
            None where they are not counted.
        training_seconds: Wall time outside decisions, data included.
        decision_seconds: Wall time of decisions; on a GPU with the work they waited for.
    """

    training_flops: int | None
    decision_flops: int | None
    training_seconds: float = 0.0
    decision_seconds: float = 0.0


class CostMeter:
    """Measures what training costs while it goes on.

    Operations are counted by torch's `FlopCounterMode`: matrix products, convolutions and
    attention, a multiplication and an addition each one operation; elementwise work counts as none.
    A step is counted the first time that a structure meets batches of a shape, and has the same
    figure from then on; what a decision does is counted each time. Counting changes no result.

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
        start = 0 if count_flops else None
        self.cost = RunCost(training_flops=start, decision_flops=start)
        self._slots = slots
        self._count = count_flops
        self._clock = clock
        self._known: dict[Hashable, int] = {}
        self._mark: float | None = None

    def start(self) -> None:
        """Begin to take the time; what came before was setting up."""
        self._mark = self._clock()

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Count a batch's forward and backward.

        Args:
            batch: Its tensors' shapes, with the slots' structure, are what the count depends on.
        """
        shapes = tuple(tensor.shape for tensor in tensors_in(batch)) if self._count else ()
        with self._counted("batch", shapes):
            yield

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Count an optimizer's step: nothing for elementwise ones, matrix products for others."""
        with self._counted("optimizer"):
            yield

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Count what is done in order to decide, and take its time apart."""
        self._spend_training_time()
        counter = flop_counter() if self._count else None
        try:
            with counter or nullcontext():
                yield
        finally:
            if counter is not None:
                assert self.cost.decision_flops is not None
                self.cost.decision_flops += counter.get_total_flops()
            before, self._mark = self._mark, self._clock()
            if before is not None:
                self.cost.decision_seconds += self._mark - before

    def stop(self) -> None:
        """Take the time up to now."""
        self._spend_training_time()

    def _spend_training_time(self) -> None:
        before, self._mark = self._mark, self._clock()
        if before is not None:
            self.cost.training_seconds += self._mark - before

    @contextmanager
    def _counted(self, *what: Hashable) -> Iterator[None]:
        if not self._count:
            yield
            return
        key = (self._slots.structure(), *what)
        counter = None if key in self._known else flop_counter()
        running: AbstractContextManager[object] = counter or nullcontext()
        with running:
            yield
        if counter is not None:
            self._known[key] = counter.get_total_flops()
        assert self.cost.training_flops is not None
        self.cost.training_flops += self._known[key]


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
