"""A slot's seeds compiled alone, outside of the run that will use them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from esper.compilation.compile_request import CompileRequest
from esper.compilation.compiled_functions import CompiledFunctions
from esper.compilation.compiled_slot import CompiledSlot, SeenCall, run_slot
from esper.compilation.feature_guards import FeatureGuards
from esper.compilation.pipe import pack_object, unpack_object
from esper.seeds.graph_free_copy import graph_free_copy
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.slot import SeedSlot

_WEIGHT_SCALE = 0.1
"""Weights are random, so that seeds, born as zero, compute something that can be compared."""


class JobError(ValueError):
    """A slot that cannot be sent to another process; the message says why."""


def told(error: Exception) -> str:
    """Return an error in one line; where the compiler quotes another error, that one too."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


class Compiled(NamedTuple):
    """What compiling a job came to."""

    checked: bool
    """Whether results and gradients were compared with the seeds' own."""
    cold_ms: float
    warm_ms: float


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """All that a process needs that is started to compile a slot's seeds."""

    request: CompileRequest
    slot: bytes
    """As `pack_object` makes it; its parameters are without values."""
    call: CallArguments
    options: Mapping[str, Any]
    """Of torch.compile."""

    @classmethod
    def of(
        cls,
        slot: SeedSlot,
        features: FeatureGuards,
        options: Mapping[str, Any],
        call: CallArguments = NO_ARGUMENTS,
    ) -> "CompileJob":
        """Return the job for all that a slot does in its living seed's life.

        Raises:
            JobError: A seed is of a class that another process would not find.
        """
        request = CompileRequest.of(slot, features, call, options)
        empty = {id(parameter): _without_values(parameter) for parameter in slot.parameters()}
        copied = graph_free_copy(slot, {**empty, id(slot.hook_handle): None})
        for part in copied.modules():
            part.__dict__.pop("forward", None)  # of a compiled host's module
        try:
            packed = pack_object(copied)
        except Exception as error:
            raise JobError(
                f"{request.living!r} cannot be compiled in another process: {error}"
            ) from error
        return cls(request=request, slot=packed, call=call.as_leaves(), options=dict(options))

    def run(self) -> Compiled:
        """Compile everything twice, with nothing there and with what the first time has left.

        Raises:
            JobError: A seed's class cannot be imported here.
            MiscompiledError: The compiled code computes something else.
            Exception: What compiling raises.

        Effects: consumes the default random stream, and forgets all that was compiled before.
        """
        try:
            slot = unpack_object(self.slot)
        except (AttributeError, ImportError) as error:
            raise JobError(
                f"{self.request.living!r} cannot be compiled in another process: {error}; define "
                "its classes in a module that can be imported, not in the script itself"
            ) from error
        assert isinstance(slot, SeedSlot)
        guards = self.request.features
        _give_values(slot, torch.device(guards.device))
        slot.prepare_seeds()
        seen = SeenCall(guards.random(), self.call, guards, variant=())
        cold_ms = self._prepare(slot, seen)
        warm_ms = self._prepare(slot, seen)
        return Compiled(not slot.draws_random_numbers, cold_ms, warm_ms)

    def _prepare(self, slot: SeedSlot, seen: SeenCall) -> float:
        from torch._inductor.utils import clear_caches  # noqa: PLC0415 – importing takes seconds

        torch.compiler.reset()
        clear_caches()  # libraries that are loaded are not written into another job's folder
        functions = CompiledFunctions(run_slot, options=dict(self.options))
        seed = CompiledSlot(slot)
        started = time.perf_counter()
        seed.prepare(slot.kinds_to_come(from_birth=True), seen, functions.of(None))
        seed.release()
        return 1e3 * (time.perf_counter() - started)


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _give_values(module: nn.Module, device: torch.device) -> None:
    """Give parameters without values random ones; shared ones stay shared."""
    given: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in given:
                values = _WEIGHT_SCALE * torch.randn(parameter.shape, device=device)
                filled = torch.empty_like(parameter, device=device)
                filled.detach().copy_(values)
                learns = parameter.requires_grad
                given[id(parameter)] = nn.Parameter(filled.detach(), requires_grad=learns)
            setattr(part, name, given[id(parameter)])
