"""A slot whose seeds run compiled once they are ready, and until then as they are."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.compilation.comparable import comparable, kind_of, repeats_in
from esper.compilation.compile_request import CompileRequest
from esper.compilation.feature_guards import FeatureGuards
from esper.lifecycle.stages import SeedStage
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.modes import training_mode
from esper.slots.nested import tensors_in
from esper.slots.slot import SeedSlot
from esper.slots.slot_forward import ForwardKind, ForwardMode, SlotForward, stops_recomputation

MAX_VARIANTS = 4
"""Kinds of calls for which a slot is compiled; in others it runs as it is."""

_NOTHING: dict[Hashable, Callable[..., Any]] = {}
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.complex128: 1e-6,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
}
_LOW_TOLERANCE = 0.1
"""Of bfloat16 and float16, autocast included: compiled code fuses, and so rounds less often than
eager code, and differences of some percent are what an honest seed shows."""
_GRADIENT_FACTOR = 10.0
"""Gradients may differ by so much more: a rectifier whose input was rounded to the other side of
zero passes one or does not. Of a million values a few do, 0.1 to 0.4 % of an honest gradient."""
_CHECKED_ALPHA = 0.5
_CHECKED_OUTPUT_SCALE = 0.1


class MiscompiledError(RuntimeError):
    """Compiled code computes something else than the module does."""


class SeenCall(NamedTuple):
    """One call of a slot, as a step makes it."""

    features: Tensor
    call: CallArguments
    """Of leaves, which hold nothing of the step's graph."""
    guards: FeatureGuards
    variant: Hashable
    """Equal ones run the same graphs; None if no graph could be told to be right for it."""


def variant_of(features: Tensor, call: CallArguments) -> Hashable:
    """Return what of a call graphs depend on; None if something in it cannot be compared."""
    device = features.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    arguments: Hashable = ()
    if call.args or call.kwargs:
        passed = call.args, call.kwargs
        try:
            arguments = comparable(passed), repeats_in(passed)
        except TypeError:
            return None
    return (*kind_of(features), autocast, arguments)


class CompiledSlot:
    """Stands in for a slot's forward.

    A kind of forward runs compiled, in calls of a variant, once `prepare` has compiled it and
    compared it with the slot itself. Everything else runs as it is, so that no step waits for the
    compiler; what it was called with is in `seen` then, for `prepare`. Where compiled code raises,
    the slot runs as it is too, and from then on.

    Args:
        slot: Whose forward is replaced until `release`.
    """

    def __init__(self, slot: SeedSlot) -> None:
        self.slot = slot
        self.seen: SeenCall | None = None
        """The last call in a step that did not run compiled and could."""
        self.guards: FeatureGuards | None = None
        """Of the features that its seeds meet first, and most likely next; not of the odd call."""
        self.waits_for: CompileRequest | None = None
        """What is being compiled elsewhere; None if nothing is."""
        self.failure: Exception | None = None
        """What compiled code has raised in a step; `prepare`'s caller tells."""
        self._ready: dict[Hashable, Callable[..., Any]] = {}
        """By the kind's graph and the call's variant."""
        self._graphs: set[Hashable] = set()
        self._variants: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._branches = self._seen_with = slot.branches
        self._stage: SeedStage | None = None
        """The life's stage for which everything is done that can be."""
        slot.forward = self  # type: ignore[method-assign]

    def release(self) -> None:
        """Give the slot its own forward back."""
        if self.slot.__dict__.get("forward") is self:  # else another one has taken over
            del self.slot.forward
            self.slot.watched = False

    def __call__(self, features: Tensor, call: CallArguments = NO_ARGUMENTS) -> Tensor:
        slot = self.slot
        if slot.training and slot.forced_alpha is None and torch.is_grad_enabled():
            ready = self._ready if slot.branches is self._branches else _NOTHING
            new = slot.watched or slot.branches is not self._branches
            if ready:
                graph, variant = slot.kind.graph, variant_of(features, call)
                compiled = ready.get((graph, variant))
                if compiled is not None:
                    return self._run(compiled, features, call)
                new |= graph in self._graphs and self._is_new(variant)
            if new:
                self._see(features, call)
        return SlotForward.forward(slot, features, call)

    def _run(self, compiled: Callable[..., Any], features: Tensor, call: CallArguments) -> Tensor:
        slot = self.slot
        try:
            result: Tensor = compiled(slot, features, call)
        except Exception as error:
            if stops_recomputation(error):
                raise
            self.failure = error
            self._refused.update(self._graphs)
            self._ready = {}
            return SlotForward.forward(slot, features, call)
        return result

    def _is_new(self, variant: Hashable) -> bool:
        return variant not in self._variants and len(self._variants) < MAX_VARIANTS

    def _see(self, features: Tensor, call: CallArguments) -> None:
        slot, guards = self.slot, FeatureGuards.of(features)
        if slot.watched or slot.branches is not self._branches:
            self.guards = guards
        # An expanded tensor has places that several of its values share.
        variant = None if 0 in features.stride() else variant_of(features, call)
        self.seen = SeenCall(features.detach(), call.as_leaves(), guards, variant)
        self._seen_with = slot.branches
        slot.watched = False

    @property
    def settled(self) -> bool:
        """Whether nothing has changed since `missing` was asked last, and nothing was seen."""
        slot = self.slot
        return (
            slot.branches is self._branches
            and slot.stage is self._stage
            and self.seen is None
            and self.failure is None
        )

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
            self._ready, self._refused, self._graphs, self._variants = {}, set(), set(), set()
            self.waits_for = None
            if self._seen_with is not slot.branches:
                self.seen = None
        self._stage = slot.stage
        variants = self._variants if self.seen is None else {self.seen.variant}
        missing = [
            kind
            for kind in slot.kinds_to_come()
            if kind.graph not in self._refused
            and not self._draws_behind(kind)
            and not (variants and all((kind.graph, v) in self._ready for v in variants))
        ]
        slot.watched = bool(missing) and self.seen is None
        if not missing:
            self.seen = self.waits_for = None
        return missing

    def _draws_behind(self, kind: ForwardKind) -> bool:
        """Whether a seed must draw from a stream of its own.

        Compiled, it would draw from the host's: the compiler moves all that the host's output does
        not need into the backward.
        """
        return self.slot.draws_random_numbers and kind.mode is ForwardMode.STRAIGHT_THROUGH

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
            Exception: What compiling raises, or the seed.

        Effects: alpha's buffer is written, output layers are for as long as it takes, and the
        default random stream may be consumed.
        """
        slot = self.slot
        if not bool(torch.isfinite(seen.features).all()):
            seen = seen._replace(features=seen.guards.random())
        slot.blend_alpha.fill_(_CHECKED_ALPHA)
        # In train mode a part of a seed may be in eval mode on purpose.
        mode = nullcontext() if slot.training else training_mode(slot)
        with mode, slot.unchanged_stream(), _computing_something(slot):
            for kind in kinds:
                with slot.in_kind(kind):
                    self._check(compiled, seen)
        graphs = {kind.graph for kind in kinds}
        self._variants.add(seen.variant)
        self._graphs |= graphs
        self._ready.update({(graph, seen.variant): compiled for graph in graphs})
        self.seen = self.waits_for = None

    def _check(self, compiled: Callable[..., Any], seen: SeenCall) -> None:
        try:
            self._check_once(compiled, seen)
        except MiscompiledError:  # or one value at a rectifier's edge, in few
            self._check_once(compiled, seen._replace(features=seen.guards.random()))

    def _check_once(self, compiled: Callable[..., Any], seen: SeenCall) -> None:
        slot = self.slot
        found = _outputs(compiled, slot, seen)
        if slot.draws_random_numbers:
            return
        expected = _outputs(SlotForward.forward, slot, seen)
        failure = slot.take_failure()
        if failure is not None:
            raise RuntimeError(f"the seed itself raised {failure}")
        _compare(found, expected, autocast=seen.guards.autocast_dtype)


def run_slot(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
    """Run a slot's own forward; what is compiled."""
    return SlotForward.forward(slot, features, call)


@contextmanager
def _computing_something(slot: SeedSlot) -> Iterator[None]:
    """Fill output layers of a fresh seed, which are zero, and put the zeros back.

    Through them no gradient arrives at the rest of the seed, where nothing could be compared.
    """
    layers = () if slot.living is None else slot.living.seed.output_layers
    zero = [layer for layer in layers if not any(bool(p.any()) for p in layer.parameters())]
    born = [(p, p.detach().clone()) for layer in zero for p in layer.parameters()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter, _ in born:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_CHECKED_OUTPUT_SCALE * values)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in born:
                parameter.copy_(values)


def _outputs(function: Callable[..., Tensor], slot: SeedSlot, seen: SeenCall) -> list[Tensor]:
    """Return the output, and the gradients of what it was called with and of the parameters."""
    guards, autocast = seen.guards, seen.guards.autocast_dtype
    features = torch.empty_strided(
        guards.shape, guards.stride, dtype=seen.features.dtype, device=seen.features.device
    )
    features.copy_(seen.features).requires_grad_(guards.requires_grad)
    call = seen.call.as_leaves()
    read = (features, *tensors_in((call.args, call.kwargs)), *slot.branches.parameters())
    sources = list(dict.fromkeys(source for source in read if source.requires_grad))
    with (
        torch.enable_grad(),
        torch.autocast(features.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        output = function(slot, features, call)
    if not output.requires_grad:
        return [output]
    # The same for both, and without order: sums of an ordered one would cancel, up to rounding.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.complex64 if output.is_complex() else torch.float32
    cotangent = torch.randn(output.shape, dtype=drawn, generator=generator).to(output)
    gradients = torch.autograd.grad(output, sources, cotangent, allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def _compare(found: list[Tensor], expected: list[Tensor], *, autocast: torch.dtype | None) -> None:
    """Compare an output, and the gradients behind it, each by its own size.

    A gradient may be zero by its mathematics, as that of a bias which a softmax takes out again;
    what arrives is the rounding of larger ones. So a gradient of norm s may differ by t s + eps S,
    with the tolerance t, the unit of rounding eps and the norm S of all gradients together. Unseen
    stays what is wrong by less than eps S: a gradient smaller than that may be wrong altogether,
    which is 1e-7 of the whole in float32 and 0.8 % in bfloat16. What was rounding alone has come to
    a third of it.

    Args:
        found: The output first; what compiled code has computed.
        expected: What the module computes.
        autocast: The dtype of autocast around both.

    Raises:
        MiscompiledError: One differs by more, or gradients are missing.
    """
    if len(found) != len(expected):
        raise MiscompiledError(
            f"compiled, {len(found) - 1} gradients arrive instead of {len(expected) - 1}"
        )
    low_precision = autocast is not None
    sizes = [_norm(tensor) for tensor in expected]
    whole = math.hypot(*sizes[1:])
    for number, (one, other, size) in enumerate(zip(found, expected, sizes, strict=True)):
        tolerance = _LOW_TOLERANCE if low_precision else _TOLERANCE.get(other.dtype, _LOW_TOLERANCE)
        floor = torch.finfo(torch.float32).tiny
        if number > 0:
            floor += torch.finfo(autocast or other.dtype).eps * whole
            if tolerance < _LOW_TOLERANCE:
                tolerance *= _GRADIENT_FACTOR
        difference = _norm(one.to(_precise(one)) - other.to(_precise(other)))
        if not difference <= tolerance * size + floor:
            raise MiscompiledError(
                f"compiled, a tensor of shape {tuple(other.shape)} differs by {difference:.3g} "
                f"from what the module computes, which is {size:.3g} (both as norms)"
            )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.to(_precise(tensor))))


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
