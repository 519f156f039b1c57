"""A slot whose seeds run compiled once they are ready, and until then as they are."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.compilation.compile_request import CompileRequest
from esper.compilation.feature_guards import FeatureGuards
from esper.lifecycle.stages import SeedStage
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.slot import SeedSlot
from esper.slots.slot_forward import ForwardKind, SlotForward

MAX_SHAPES = 4
"""Shapes of features for which a slot is compiled; on others it runs as it is."""

_NOTHING: dict[Hashable, Callable[..., Any]] = {}
_RELATIVE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_TOLERANCE_OF_OTHERS = 2e-2
"""Of float16. Compiled code fuses, and so rounds otherwise than eager code does."""


class MiscompiledError(RuntimeError):
    """Compiled code computes something else than the module does."""


class SeenCall(NamedTuple):
    """One call of a slot, as a step makes it."""

    features: Tensor
    call: CallArguments
    guards: FeatureGuards


class CompiledSlot:
    """Stands in for a slot's forward.

    A kind of forward runs compiled, on features of a shape, once `prepare` has compiled it and
    compared it with the slot itself. Everything else runs as it is, so that no step waits for the
    compiler; what it was called with is in `seen` then, for `prepare`.

    Args:
        slot: Whose forward is replaced until `release`.
    """

    def __init__(self, slot: SeedSlot) -> None:
        self.slot = slot
        self.seen: SeenCall | None = None
        """The last call in a step that did not run compiled and could."""
        self.guards: FeatureGuards | None = None
        """Of the features that were seen last."""
        self.waits_for: CompileRequest | None = None
        """What is being compiled elsewhere; None if nothing is."""
        self._ready: dict[Hashable, Callable[..., Any]] = {}
        """By the kind's graph and the features' shape."""
        self._shapes: set[torch.Size] = set()
        self._refused: set[Hashable] = set()
        self._branches = self._seen_with = slot.branches
        self._stage: SeedStage | None = None
        """The life's stage for which everything is done that can be."""
        slot.forward = self  # type: ignore[method-assign]

    def release(self) -> None:
        """Give the slot its own forward back."""
        self.slot.watched = False
        if self.slot.__dict__.get("forward") is self:
            del self.slot.forward

    def __call__(self, features: Tensor, call: CallArguments = NO_ARGUMENTS) -> Tensor:
        slot = self.slot
        if slot.training and slot.forced_alpha is None and torch.is_grad_enabled():
            ready = self._ready if slot.branches is self._branches else _NOTHING
            if ready:
                compiled = ready.get((slot.kind.graph, features.shape))
                if compiled is not None:
                    result: Tensor = compiled(slot, features, call)
                    return result
            new_seeds = slot.branches is not self._branches
            if slot.watched or new_seeds or (ready and self._is_new(features.shape)):
                self._see(features, call)
        return SlotForward.forward(slot, features, call)

    def _is_new(self, shape: torch.Size) -> bool:
        return shape not in self._shapes and len(self._shapes) < MAX_SHAPES

    def _see(self, features: Tensor, call: CallArguments) -> None:
        self.guards = FeatureGuards.of(features)
        self.seen = SeenCall(features.detach(), call.detached(), self.guards)
        self._seen_with = self.slot.branches
        self.slot.watched = False

    @property
    def settled(self) -> bool:
        """Whether nothing has changed since `missing` was asked last, and nothing was seen."""
        slot = self.slot
        return slot.branches is self._branches and slot.stage is self._stage and self.seen is None

    @property
    def pending(self) -> bool:
        """Whether it runs as it is for now only, until a step was seen or its graphs are there."""
        return not self.settled or self.slot.watched or self.waits_for is not None

    def still_waits(self) -> bool:
        """Return whether its seeds are being compiled elsewhere; another stage changes nothing."""
        if self.waits_for is None or self.slot.branches is not self._branches:
            return False
        self._stage = self.slot.stage
        return True

    def missing(self) -> list[ForwardKind]:
        """Return the kinds of forward that will come and are not ready on what was seen.

        Where nothing was seen yet, the slot is watched, so that the next step shows it.
        """
        slot = self.slot
        if slot.branches is not self._branches:
            self._branches = slot.branches
            self._ready, self._refused, self._shapes = {}, set(), set()
            self.waits_for = None
            if self._seen_with is not slot.branches:
                self.seen = None
        self._stage = slot.stage
        shapes = self._shapes if self.seen is None else {torch.Size(self.seen.guards.shape)}
        missing = [
            kind
            for kind in slot.kinds_to_come()
            if kind.graph not in self._refused
            and not (shapes and all((kind.graph, shape) in self._ready for shape in shapes))
        ]
        slot.watched = bool(missing) and self.seen is None
        if not missing:
            self.seen = self.waits_for = None
        return missing

    def refuse(self, kinds: Sequence[ForwardKind]) -> None:
        """Let kinds run as they are while the slot holds these seeds."""
        self._refused.update(kind.graph for kind in kinds)
        self.seen = self.waits_for = None
        self.slot.watched = False

    def wait_for(self, request: CompileRequest) -> None:
        """Let go of what was seen, which holds memory, until a request is answered."""
        self.waits_for = request
        self.seen = None

    def prepare(
        self, kinds: Sequence[ForwardKind], seen: SeenCall, compiled: Callable[..., Any]
    ) -> None:
        """Compile kinds of forward for a call, and compare the results.

        Seeds that draw random numbers are not compared: compiled, they draw others.

        Args:
            kinds: What to compile.
            seen: A call to compile it for.
            compiled: Takes the slot, features and call.

        Raises:
            MiscompiledError: The compiled code computes something else.
            Exception: What compiling raises.
        """
        slot, shape = self.slot, torch.Size(seen.guards.shape)
        with slot.unchanged_stream():
            for kind in kinds:
                with slot.in_kind(kind):
                    found = _outputs(compiled, slot, seen)
                    if not slot.draws_random_numbers:
                        _compare(found, _outputs(SlotForward.forward, slot, seen))
        self._shapes.add(shape)
        self._ready.update({(kind.graph, shape): compiled for kind in kinds})
        self.seen = self.waits_for = None


def run_slot(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
    """Run a slot's own forward; what is compiled."""
    return SlotForward.forward(slot, features, call)


def _outputs(function: Callable[..., Tensor], slot: SeedSlot, seen: SeenCall) -> list[Tensor]:
    """Return the output, and the gradients of its features and of the seeds' parameters."""
    autocast = seen.guards.autocast_dtype
    features = seen.features.detach().clone().requires_grad_(seen.guards.requires_grad)
    learning = [p for p in slot.branches.parameters() if p.requires_grad]
    sources = [*([features] if features.requires_grad else []), *learning]
    with (
        torch.enable_grad(),
        torch.autocast(features.device.type, dtype=autocast, enabled=autocast is not None),
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
