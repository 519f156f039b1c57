"""A host that runs compiled while it trains, and the seeds that grow in it."""

import time
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from pydantic_core import PydanticSerializationError, to_json

from esper.compilation.compile_job import CompileJob, told
from esper.compilation.compile_service import CompileService
from esper.compilation.compiled_functions import CompiledFunctions
from esper.compilation.compiled_region import CompiledRegion, regions_of, run_module
from esper.compilation.compiled_slot import CompiledSlot, SeenCall, run_slot
from esper.compilation.structures import InnerHooks, structure_of_slot
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import CompiledBy, CompileFailed, Event, SeedCompiled
from esper.lifecycle.stages import IllegalTransition
from esper.slots.breaker import CircuitBreaker
from esper.slots.forwards import give_forwards_back
from esper.slots.modes import beside_the_step
from esper.slots.slot_forward import ForwardKind
from esper.slots.slot_set import SlotSet

_NOT_COMPARABLE = (
    "its calls pass something besides dense tensors and constants, or its features are an expanded "
    "tensor, so that nothing tells for which calls a graph would be right"
)


class CompileError(RuntimeError):
    """Another process could not compile a seed; the message says why."""


def seed_options(**options: Any) -> dict[str, Any]:
    """Return the options of torch.compile for seeds, with those that were chosen for the host."""
    return {"dynamic": False, **options, "fullgraph": True}


class CompiledHost:
    """Compiles a host's modules each alone, and its slots' seeds while they grow.

    The host's graphs are never built anew: slots stand outside of them. A seed's graphs are those
    of every stage to come; `prepare` compiles them between two steps, on features that a step
    really had, and compares them with the seed itself. Until then, or if that fails, the seed runs
    as it is. With a service the compiler is not waited for: its worker compiles meanwhile, and
    `prepare` finds everything done. From a compiled host that was not released another one takes
    over.

    Args:
        slots: From `esper.attach`.
        service: Compiles ahead in another process; None compiles here, and waits for it.
        options: Of torch.compile, as `mode`; `fullgraph` is True. Seeds are compiled for the shapes
            of features that they meet, so `dynamic` is False for them unless it is given.

    Raises:
        ValueError: The host is sharded, or the service's worker cannot be told an option, as a
            function is one.
        Exception: What torch.compile raises for options that it does not take.

    Example:
        >>> import torch, esper
        >>> from esper.compilation import CompiledHost
        >>> host = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(8, 2))
        ... )
        >>> slots = esper.attach(host, ["0"], example=torch.zeros(2, 4))
        >>> compiled = CompiledHost(slots, backend="eager")
        >>> [region.path for region in compiled.regions]
        ['1']
        >>> compiled.release()
    """

    def __init__(
        self, slots: SlotSet, *, service: CompileService | None = None, **options: Any
    ) -> None:
        if slots.sharded:
            raise ValueError(
                "a sharded host cannot be compiled by CompiledHost: FSDP2 gathers and frees "
                "weights around each module's forward; leave it as it is, or replicate the host "
                "with DDP instead"
            )
        if service is not None:
            _refuse_what_a_worker_cannot_be_told(options)
        settings = {**options, "fullgraph": True}
        torch.compile(run_module, **settings)  # refuses here what it would in the first step
        self._service = service
        self._options = seed_options(**options)
        self._functions = CompiledFunctions(run_slot, options=self._options)
        self._breakers: dict[str, CircuitBreaker] = {}
        self._foreseen: set[Hashable] = set()
        self.version = 0
        """Another one whenever something else than before runs compiled."""
        self._heard = 0
        """The service's version at the last `prepare`."""
        self._events: list[Event] = []
        host = CompiledFunctions(run_module, options=settings)
        give_forwards_back(slots.model)  # a compiled host may have been copied, or not released
        self.regions = [
            CompiledRegion(path, module, host, failed=self._failed)
            for path, module in list(regions_of(slots.model))
        ]
        self.seeds = {path: CompiledSlot(slot) for path, slot in slots.items()}
        if service is not None:
            for slot in slots.values():  # what may grow here can be compiled before it does
                slot.watched = True

    def release(self) -> None:
        """Give every module its own forward back; the service stays as it is."""
        for region in self.regions:
            region.release()
        for seed in self.seeds.values():
            seed.release()

    def due(self) -> bool:
        """Return whether `prepare` has something to do."""
        if self._events:
            return True
        if self._service is not None and self._service.version != self._heard:
            return True
        return not all(seed.settled for seed in self.seeds.values())

    @property
    def pending(self) -> bool:
        """Whether a seed runs as it is for now only: a step, or the service, is waited for."""
        return any(seed.pending for seed in self.seeds.values())

    def prepare(self) -> list[Event]:
        """Compile what seeds will run in the stages to come, as far as a step has shown on what.

        Call it between two steps; it does nothing unless that is `due`.

        Returns:
            SeedCompiled or CompileFailed for each seed, and what has failed in the host meanwhile.

        Effects: seeds run a few times. Random streams, buffers and gradients are left as they were.
        Without a service it waits for the compiler.
        """
        if self._service is not None:
            self._heard = self._service.version
            self._events += self._service.events()
        for seed in self.seeds.values():
            if self._waits(seed):
                continue
            kinds = seed.missing()
            if kinds:
                self._attend(seed, kinds)
            self._tell_failure(seed)
        events, self._events = self._events, []
        self.version += bool(events)
        return events

    def foresee(self, germinations: Iterable[Germinate]) -> None:
        """Let the service compile what may germinate next; without one it does nothing.

        Args:
            germinations: The likeliest first.

        Effects: builds each seed once, beside the model. `prepare` tells of what cannot be built.
        """
        if self._service is None:
            return
        for action in germinations:
            seed = self.seeds.get(action.slot)
            if seed is None or seed.guards is None:
                continue
            slot, guards = seed.slot, seed.guards
            key = (action.model_dump_json(), slot.num_committed, guards)
            if key in self._foreseen:
                continue
            try:
                foreseen = slot.foreseen(
                    action.blueprint, blend_operator=action.blend_operator, **action.options
                )
                if foreseen.contextual:  # what its calls will pass is not known yet
                    continue
                job = CompileJob.of(foreseen, guards, self._options)
                asked = self._service.ask(job, ahead=True)
            except IllegalTransition:  # not now
                continue
            except Exception as error:  # noqa: BLE001 – whatever building raises, the run goes on
                self._foreseen.add(key)
                failed = CompileFailed(
                    place=slot.path, blueprint=action.blueprint, error=told(error)
                )
                self._events.append(failed)
                continue
            if not asked:
                return  # enough waits; the policy will be asked again
            self._foreseen.add(key)

    def _tell_failure(self, seed: CompiledSlot) -> None:
        error, seed.failure = seed.failure, None
        if error is not None:
            slot = seed.slot
            blueprint = slot.branch(len(slot.branches) - 1).blueprint if slot.branches else None
            self._events.append(
                CompileFailed(place=slot.path, blueprint=blueprint, error=told(error))
            )

    def _waits(self, seed: CompiledSlot) -> bool:
        """Return whether a seed's request is not answered yet."""
        if self._service is None or not seed.still_waits():
            return False
        assert seed.waits_for is not None
        return self._service.answer(seed.waits_for) is None

    def _attend(self, seed: CompiledSlot, kinds: Sequence[ForwardKind]) -> None:
        """Compile a seed, let it be compiled, or tell why that cannot be."""
        slot = seed.slot
        name = slot.branch(len(slot.branches) - 1).blueprint
        breaker = self._breakers.setdefault(name, CircuitBreaker(f"compile {name}"))
        if not breaker.allows:
            seed.refuse(kinds)
            often = f"compiling {name!r} failed {breaker.max_failures} times in a row"
            self._events.append(CompileFailed(place=slot.path, blueprint=name, error=often))
            return
        try:
            compiled = self._compile(seed, kinds)
        except Exception as error:  # noqa: BLE001 – whatever the compiler raises, training goes on
            seed.refuse(kinds)
            self._events += breaker.failed()
            failure = CompileFailed(place=slot.path, blueprint=name, error=told(error))
            self._events.append(failure)
            return
        if compiled is not None:
            self._events += breaker.succeeded()
            measured = slot.measurements
            measured.prewarm_ms = (measured.prewarm_ms or 0.0) + compiled.milliseconds
            self._events.append(compiled)

    def _compile(self, seed: CompiledSlot, kinds: Sequence[ForwardKind]) -> SeedCompiled | None:
        """Return what was compiled; None if it has to wait, for a step or for the service."""
        slot, seen = seed.slot, seed.seen
        if seen is not None and seen.variant is None:
            raise CompileError(_NOT_COMPARABLE)
        if self._service is None:
            return None if seen is None else self._prepare(seed, kinds, seen, "here")
        if seed.waits_for is not None:
            waited = self._service.answer(seed.waits_for)
            if waited is not None and waited.error is not None:
                raise CompileError(waited.error)
        if seen is None:
            if seed.waits_for is None and seed.guards is not None and not slot.contextual:
                # What the next step will show, most likely.
                job = CompileJob.of(slot, seed.guards, self._options)
                if self._service.answer(job.request) is None:
                    self._service.ask(job)
            return None
        job = CompileJob.of(slot, seen.guards, self._options, seen.call)
        self._service.ask(job)
        answer = self._service.answer(job.request)
        if answer is None:
            seed.wait_for(job.request)
            return None
        if answer.error is not None:
            raise CompileError(answer.error)
        return self._prepare(seed, kinds, seen, answer.source)

    def _prepare(
        self,
        seed: CompiledSlot,
        kinds: Sequence[ForwardKind],
        seen: SeenCall,
        source: CompiledBy,
    ) -> SeedCompiled:
        slot = seed.slot
        started = time.perf_counter()
        structure = structure_of_slot(slot), InnerHooks(slot).now()
        function = self._functions.of((structure, seen.variant))
        with beside_the_step(slot):
            seed.prepare(kinds, seen, function)
        return SeedCompiled(
            slot=slot.path,
            blueprint=slot.branch(len(slot.branches) - 1).blueprint,
            kinds=len(kinds),
            checked=not slot.draws_random_numbers,
            source=source,
            milliseconds=1e3 * (time.perf_counter() - started),
        )

    def _failed(self, path: str, error: Exception) -> None:
        self._events.append(CompileFailed(place=path, blueprint=None, error=told(error)))


def _refuse_what_a_worker_cannot_be_told(options: dict[str, Any]) -> None:
    for name, value in options.items():
        try:
            to_json(value)
        except PydanticSerializationError as error:
            raise ValueError(
                f"{name}={value!r} cannot be told to the worker that compiles for a service: "
                f"{error}; pass what JSON can hold, a backend by its name, or leave service= out"
            ) from error
