"""A host that runs compiled while it trains, and the seeds that grow in it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from esper.compilation.compiled_functions import CompiledFunctions
from esper.compilation.compiled_region import CompiledRegion, regions_of, run_module
from esper.compilation.compiled_slot import CompiledSlot, run_slot
from esper.compilation.structures import structure_of_module, structure_of_slot
from esper.lifecycle.events import CompileFailed, Event, SeedCompiled
from esper.slots.breaker import CircuitBreaker
from esper.slots.modes import beside_the_step
from esper.slots.slot_forward import ForwardKind
from esper.slots.slot_set import SlotSet


class CompiledHost:
    """Compiles a host's modules each alone, and its slots' seeds when they germinate.

    The host's graphs are never built anew: slots stand outside of them. A seed's graphs are those
    of every stage to come; they are compiled and compared with the seed itself in `prepare`, beside
    the step, and until then, or if that fails, the seed runs as it is.

    Args:
        slots: From `esper.attach`.
        options: Of torch.compile, as `mode`; `fullgraph` is True.

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

    def __init__(self, slots: SlotSet, **options: Any) -> None:
        settings = {**options, "fullgraph": True}
        self._slots = slots
        self._functions = CompiledFunctions(run_slot, options=settings)
        self._breakers: dict[str, CircuitBreaker] = {}
        self._events: list[Event] = []
        host = CompiledFunctions(run_module, options=settings)
        self.regions = [
            CompiledRegion(path, module, host.of(structure_of_module(module)), failed=self._failed)
            for path, module in list(regions_of(slots.model))
        ]
        self.seeds = {path: CompiledSlot(slot) for path, slot in slots.items()}

    def release(self) -> None:
        """Give every module its own forward back."""
        for region in self.regions:
            region.release()
        for seed in self.seeds.values():
            seed.release()

    def due(self) -> bool:
        """Return whether `prepare` has something to do."""
        return any(seed.missing() for seed in self.seeds.values())

    def prepare(self, loss: Callable[[], Tensor]) -> list[Event]:
        """Compile what seeds will run in the stages to come; does nothing unless that is due.

        Args:
            loss: Computes the step's loss as the step will: `lambda: criterion(model(x), y)`.

        Returns:
            SeedCompiled or CompileFailed for each seed, and what has failed in the host meanwhile.

        Effects, when due: `loss` is called once, forward only, so module hooks run once more; the
        seeds run a few times more. Random streams, buffers and gradients are left as they were.
        Waits for the compiler and for the device.
        """
        due = {path: kinds for path, seed in self.seeds.items() if (kinds := seed.missing())}
        if due:
            model = self._slots.model
            with ExitStack() as stack:
                stack.enter_context(beside_the_step(model))
                for slot in self._slots.values():
                    stack.enter_context(slot.unchanged_stream())
                with ExitStack() as watching:
                    for path in due:
                        watching.enter_context(self.seeds[path].watch())
                    loss()
                for path, kinds in due.items():
                    self._events.append(self._prepare(self.seeds[path], kinds))
        events, self._events = self._events, []
        return events

    def _prepare(self, seed: CompiledSlot, kinds: Sequence[ForwardKind]) -> Event:
        slot = seed.slot
        name = slot.branch(len(slot.branches) - 1).blueprint
        breaker = self._breakers.setdefault(name, CircuitBreaker(f"compile {name}"))
        if not breaker.allows:
            seed.refuse(kinds)
            told = f"compiling {name!r} failed {breaker.max_failures} times in a row"
            return CompileFailed(place=slot.path, blueprint=name, error=told)
        started = time.perf_counter()
        try:
            seed.prepare(kinds, self._functions.of(structure_of_slot(slot)))
        except Exception as error:  # noqa: BLE001 – whatever the compiler raises, training goes on
            self._events += breaker.failed()
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            return CompileFailed(place=slot.path, blueprint=name, error=told)
        self._events += breaker.succeeded()
        milliseconds = 1e3 * (time.perf_counter() - started)
        slot.measurements.prewarm_ms = (slot.measurements.prewarm_ms or 0.0) + milliseconds
        return SeedCompiled(
            slot=slot.path,
            blueprint=name,
            kinds=len(kinds),
            checked=not slot.draws_random_numbers,
            milliseconds=milliseconds,
        )

    def _failed(self, path: str, error: Exception) -> None:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        self._events.append(CompileFailed(place=path, blueprint=None, error=told))
