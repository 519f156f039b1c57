"""What a run has cost: operations and seconds, training apart from evaluating and deciding."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.slots.nested import tensors_in
from esper.slots.slot_set import SlotSet
from esper.slots.state_fields import check_fields
from esper.training.flop_formulas import flop_counter

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


@dataclass
class _Spent:
    """On one purpose, so far."""

    flops: int = 0
    seconds: float = 0.0


class CostMeter:
    """Measures what training costs while it goes on.

    Operations are counted by torch's `FlopCounterMode`: matrix products, convolutions, attention
    and recurrent layers, a multiplication and an addition each one operation; elementwise work
    counts as none.
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
        self._known: dict[Hashable, tuple[int, int]] = {}
        """Operations of a step, and how many of them are the optimizer's."""
        self._optimizer_flops = 0
        """Of the last step, where it was known."""
        self._counted_inside = 0
        """Of what the innermost counter has seen, operations that another one has counted."""
        self._spent = {purpose: _Spent() for purpose in ("training", "evaluation", "decision")}
        self._training = self._purpose = self._spent["training"]
        self._mark: float | None = None

    @property
    def cost(self) -> RunCost:
        """What has been spent so far."""
        return RunCost(
            **{
                purpose: Cost(flops=spent.flops if self._count else None, seconds=spent.seconds)
                for purpose, spent in self._spent.items()
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what has been spent so far."""
        self._take_time()
        return {purpose: asdict(spent) for purpose, spent in self._spent.items()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a state is whole."""
        check_fields(state, self._spent, of="the meter")
        for purpose in self._spent:
            check_fields(state[purpose], ("flops", "seconds"), of=f"the cost of {purpose}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        for purpose, spent in self._spent.items():
            spent.flops, spent.seconds = state[purpose]["flops"], state[purpose]["seconds"]

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

    def step(self, batches: Any) -> AbstractContextManager[None]:
        """Count an optimizer step: its forwards, its backwards, and what the optimizer does.

        What elementwise optimizers do counts as nothing, the matrix products of others count. The
        optimizer steps inside the block; a step that it skips is told afterwards, by
        `optimizer_has_skipped`, which `Growth.after_step` does.

        Args:
            batches: Whose gradients it takes together. Their tensors' shapes, with the slots'
                structure, are what the count depends on.
        """
        if not self._count:
            return _NOT_COUNTED
        key = (self._slots.structure(), tuple([tensor.shape for tensor in tensors_in(batches)]))
        known = self._known.get(key)
        if known is None:
            return self._counted_first(key)
        flops, self._optimizer_flops = known
        self._training.flops += flops
        return _NOT_COUNTED

    def optimizer_has_skipped(self) -> None:
        """Take back what was counted of the optimizer in the last step: it has made none."""
        self._training.flops -= self._optimizer_flops
        self._optimizer_flops = 0

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Count what is done in order to decide, and take its time apart."""
        with self._apart("decision"):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Count a plain evaluation, and take its time apart; inside a decision it is none of it."""
        with self._apart("evaluation"):
            yield

    @contextmanager
    def _apart(self, purpose: str) -> Iterator[None]:
        self._take_time()
        around, self._purpose = self._purpose, self._spent[purpose]
        try:
            with self._counting(self._purpose) if self._count else nullcontext():
                yield
        finally:
            self._take_time()
            self._purpose = around

    def _take_time(self) -> None:
        if self._mark is not None:
            now = self._clock()
            self._purpose.seconds += now - self._mark
            self._mark = now

    @contextmanager
    def _counted_first(self, key: Hashable) -> Iterator[None]:
        binding, before = self._slots.binding, self._training.flops
        seen: list[int] = []
        # What compiled code does cannot be counted.
        with torch.compiler.set_stance("force_eager"), self._counting(self._training) as counter:

            def see(*_: Any) -> None:
                seen.append(counter.get_total_flops())

            hooks = []
            if binding is not None:
                hooks.append(binding.optimizer.register_step_pre_hook(see))
                hooks.append(binding.optimizer.register_step_post_hook(see))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
        self._optimizer_flops = 0
        if binding is not None and binding.has_stepped:  # else it is counted again the next time
            of_optimizer = sum(seen[1::2]) - sum(seen[::2])
            self._known[key] = (self._training.flops - before, of_optimizer)

    @contextmanager
    def _counting(self, spent: _Spent) -> Iterator[FlopCounterMode]:
        """Add what the block takes, but for what is counted apart inside of it."""
        around, self._counted_inside = self._counted_inside, 0
        with flop_counter() as counter:
            try:
                yield counter
            finally:
                total = counter.get_total_flops()
                spent.flops += total - self._counted_inside
                self._counted_inside = around + total
