"""A slot whose seeds run compiled once they are ready, and until then as they are."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.slot import SeedSlot
from esper.slots.slot_forward import ForwardKind, SlotForward

_RELATIVE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_TOLERANCE_OF_OTHERS = 2e-2
"""Of float16. Compiled code fuses, and so rounds otherwise than eager code does."""


class MiscompiledError(RuntimeError):
    """Compiled code computes something else than the module does."""


@dataclass(frozen=True)
class SeenCall:
    """One call of a slot, as a step makes it."""

    features: Tensor
    call: CallArguments
    autocast: torch.dtype | None
    """None outside of autocast."""


class CompiledSlot:
    """Stands in for a slot's forward.

    A kind of forward runs compiled once `prepare` has compiled it and compared it with the slot
    itself; every other one runs as it is, so that no step waits for the compiler.

    Args:
        slot: Whose forward is replaced until `release`.
    """

    def __init__(self, slot: SeedSlot) -> None:
        self.slot = slot
        self._ready: dict[Hashable, Callable[..., Any]] = {}
        self._refused: set[Hashable] = set()
        self._branches = slot.branches
        self._watching = False
        self._seen: SeenCall | None = None
        slot.forward = self  # type: ignore[method-assign]

    def release(self) -> None:
        """Give the slot its own forward back."""
        if self.slot.__dict__.get("forward") is self:
            del self.slot.forward

    def __call__(self, features: Tensor, call: CallArguments = NO_ARGUMENTS) -> Tensor:
        slot = self.slot
        if self._watching:
            device = features.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self._seen = SeenCall(features, call, dtype)
        elif (
            self._ready
            and slot.training
            and slot.forced_alpha is None
            and slot.branches is self._branches
            and torch.is_grad_enabled()
        ):
            compiled = self._ready.get(slot.kind.graph)
            if compiled is not None:
                result: Tensor = compiled(slot, features, call)
                return result
        return SlotForward.forward(slot, features, call)

    def missing(self) -> list[ForwardKind]:
        """Return the kinds of forward that will come and are neither ready nor refused."""
        if self.slot.branches is not self._branches:
            self._branches, self._ready, self._refused = self.slot.branches, {}, set()
        return [
            kind
            for kind in self.slot.kinds_to_come()
            if kind.graph not in self._ready and kind.graph not in self._refused
        ]

    def refuse(self, kinds: Sequence[ForwardKind]) -> None:
        """Let kinds run as they are while the slot holds these seeds."""
        self._refused.update(kind.graph for kind in kinds)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look at the call that is made inside, which passes the features through."""
        self._watching = True
        try:
            with self.slot.passed_through():
                yield
        finally:
            self._watching = False

    def prepare(self, kinds: Sequence[ForwardKind], compiled: Callable[..., Any]) -> None:
        """Compile kinds of forward for calls like the one that was seen, and compare the results.

        Seeds that draw random numbers are not compared: compiled, they draw others.

        Args:
            kinds: From `missing`.
            compiled: Takes the slot, features and call.

        Raises:
            MiscompiledError: The compiled code computes something else.
            Exception: What compiling raises.
            In both cases none of them is tried again while the slot holds these seeds.
        """
        seen, self._seen = self._seen, None
        assert seen is not None
        self.refuse(kinds)
        for kind in kinds:
            with self.slot.in_kind(kind):
                found = _outputs(compiled, self.slot, seen)
                if not self.slot.draws_random_numbers:
                    _compare(found, _outputs(SlotForward.forward, self.slot, seen))
        self._ready.update(dict.fromkeys((kind.graph for kind in kinds), compiled))


def run_slot(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
    """Run a slot's own forward; what is compiled."""
    return SlotForward.forward(slot, features, call)


def _outputs(function: Callable[..., Tensor], slot: SeedSlot, seen: SeenCall) -> list[Tensor]:
    """Return the output, and the gradients of its features and of the seeds' parameters."""
    features = seen.features.detach().clone().requires_grad_(seen.features.requires_grad)
    learning = [p for p in slot.branches.parameters() if p.requires_grad]
    sources = [*([features] if features.requires_grad else []), *learning]
    with torch.autocast(
        features.device.type, dtype=seen.autocast, enabled=seen.autocast is not None
    ):
        output = function(slot, features, seen.call)
    if not output.requires_grad:
        return [output]
    # Any cotangent that is the same for both, and not the same everywhere.
    cotangent = torch.linspace(-1.0, 1.0, output.numel(), device=output.device)
    gradients = torch.autograd.grad(
        output, sources, cotangent.to(output.dtype).reshape(output.shape), allow_unused=True
    )
    return [output.detach(), *(g for g in gradients if g is not None)]


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    if len(found) != len(expected):
        raise MiscompiledError(
            f"compiled, {len(found) - 1} gradients arrive instead of {len(expected) - 1}"
        )
    for one, other in zip(found, expected, strict=True):
        tolerance = _RELATIVE_TOLERANCE.get(other.dtype, _TOLERANCE_OF_OTHERS)
        size = float(other.float().abs().max()) if other.numel() else 0.0
        difference = float((one.float() - other.float()).abs().max()) if other.numel() else 0.0
        if not difference <= tolerance * size + torch.finfo(torch.float32).tiny:
            raise MiscompiledError(
                f"compiled, a tensor of shape {tuple(other.shape)} differs by {difference:.3g} "
                f"from what the module computes, which is {size:.3g} at most"
            )
