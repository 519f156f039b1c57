"""A step's forward and backward as CUDA graphs, while nothing but values changes in it."""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.compilation.comparable import comparable
from esper.compilation.compile_job import told
from esper.compilation.compiled_host import CompiledHost
from esper.compilation.placements import Placements
from esper.lifecycle.events import CompileFailed, Event, StepCaptured
from esper.slots.modes import sole_device
from esper.slots.nested import map_tensors, tensors_in
from esper.slots.slot_forward import ForwardMode
from esper.slots.slot_set import SlotSet

WARM_UP_STEPS = 3
"""As torch asks for before a capture, in which no library may set itself up."""

MAX_GRAPHS = 8
_PLACE = "the step"
_BATCH_LEARNS = (
    "a tensor in the batch requires a gradient, which a replayed step, made on a copy of it, would "
    "not give it; detach it, or leave cuda_graphs out where its gradient is needed"
)
_ASSIGNS = (
    "the step has assigned another tensor to a parameter's or buffer's name, which a replayed step "
    "would not: write into the one that is there, as by copy_, or leave cuda_graphs out"
)
_BESIDES_CHANGED = (
    "a parameter that is not the model's, as the loss may have, lies elsewhere than when the step "
    "was captured, or does not learn any more: write into it in place, or make another CapturedStep"
)
_ACCUMULATES = "torch::autograd::AccumulateGrad"
"""The node of a backward that adds to a tensor's `.grad`."""


class CapturedStep:
    """Makes the forward and backward of batches, and replays them as CUDA graphs.

    A graph launches all kernels of a forward, or of a backward, at once, and no Python of the host
    runs. It is right while nothing but values changes: the slots' structure and stages, which
    parameters and buffers there are and where they lie, the shapes of the batch. Such a window is
    run eagerly for three steps, captured in the fourth, and replayed from then on, also when it
    returns later. A seed that germinates or enters another stage, or a last smaller batch, begins a
    new window. Alpha is read from its buffer inside of the graph, so that a ramp replays one graph.

    What runs in a step besides stays as it is: the optimizer, clipping, gradient norms, checks of
    isolation, shadow passes. A seed that draws random numbers behind the host is run eagerly in
    TRAINING, from its own stream; so is whatever cannot be captured.

    Parameters of the loss's own get their gradients too. That one of them was replaced, or learns
    only from now on, is not seen.

    The host must not change what it does from step to step by Python alone, as by a counter of its
    own: a graph replays what it did when it was captured.

    Args:
        slots: From `esper.attach`.
        loss: Returns a batch's loss, 0-dim; takes what the step is called with.
        scale: What the backward is made of instead of the loss, as `GradScaler.scale`.
        compiled: The host that runs compiled; what it is still compiling is waited for.

    Raises:
        ValueError: The model is not on one CUDA device, or several processes train it.

    Example:
        step = CapturedStep(slots, lambda x, y: criterion(model(x), y))
        for x, y in batches:
            loss = step(x, y)
            optimizer.step()
            optimizer.zero_grad()
            growth.after_step()

    Source: whole-network capture as in torch's notes on CUDA semantics.
    """

    def __init__(
        self,
        slots: SlotSet,
        loss: Callable[..., Tensor],
        *,
        scale: Callable[[Tensor], Tensor] | None = None,
        compiled: CompiledHost | None = None,
    ) -> None:
        device = sole_device(slots.model)
        if device is None or device.type != "cuda":
            where = "several devices" if device is None else f"{device}"
            raise ValueError(
                f"CUDA graphs need a model that is on one CUDA device; this one is on {where}: "
                "leave cuda_graphs out, or move the model first"
            )
        if slots.replication is not None:
            raise ValueError(
                "CUDA graphs are for one process; several train this model, and the gradients "
                "that their wrapper averages cannot be captured here: leave cuda_graphs out"
            )
        self._slots = slots
        self._loss = loss
        self._scale = scale
        self._compiled = compiled
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._windows: OrderedDict[Hashable, _Window] = OrderedDict()
        self._placements = Placements(slots.model, max_placements=MAX_GRAPHS)
        self._events: list[Event] = []

    def __call__(self, *batch: Any, between: Callable[[Tensor], None] | None = None) -> Tensor:
        """Make forward and backward of a batch.

        Args:
            between: Is given the loss, detached, between the two.
            batch: What the loss takes: tensors on the model's device and constants, in nested
                tuples, lists and mappings. With anything else in it, it runs eagerly.

        Returns:
            The loss, 0-dim, detached; gradients are added to `.grad`, as by a backward.

        Raises:
            ValueError: A tensor is on another device than the model.
        """
        self._check_devices(batch)
        window = self._window(batch)
        if window is not None and window.graph is not None and window.graph.besides_changed():
            window.graph = None
            self._refuse(window, _BESIDES_CHANGED)
        if window is None or window.refused:
            return self._passes(batch, between)
        if window.graph is None and window.steps >= WARM_UP_STEPS:
            self._capture(window, batch)
        if window.graph is None:
            window.steps += 1
            return self._on_the_side(batch, between)
        return window.graph.replay(tensors_in(batch), between)

    def take_events(self) -> list[Event]:
        """Return what was captured and what could not be, since this was asked last."""
        events, self._events = self._events, []
        return events

    def _check_devices(self, batch: Sequence[Any]) -> None:
        for tensor in tensors_in(batch):
            if tensor.device != self._device:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} in the batch is on {tensor.device}, "
                    f"and the model on {self._device}; move the batch before the step"
                )

    def _window(self, batch: Sequence[Any]) -> "_Window | None":
        """Return the window that the batch falls into; None if it must run eagerly."""
        slots = self._slots
        if any(
            slot.draws_random_numbers and slot.mode is ForwardMode.STRAIGHT_THROUGH
            for slot in slots.living_slots
        ):
            return None
        version = None
        if self._compiled is not None:
            if self._compiled.pending:
                return None
            version = self._compiled.version
        try:
            shapes = comparable(batch)
        except TypeError:
            return None
        key = (
            slots.structure(),
            self._placements.number(),
            # A frozen seed's gradients are dropped in the backward, and an isolated one's mended.
            *((slot.path, slot.stage, slot.fading) for slot in slots.living_slots),
            slots.model.training,
            torch.is_autocast_enabled(self._device.type),
            torch.get_autocast_dtype(self._device.type),
            version,
            shapes,
        )
        window = self._windows.setdefault(key, _Window())
        self._windows.move_to_end(key)
        if len(self._windows) > MAX_GRAPHS:
            self._windows.popitem(last=False)
        return window

    def _passes(self, batch: Sequence[Any], between: Callable[[Tensor], None] | None) -> Tensor:
        loss = self._loss(*batch)
        value = loss.detach()
        if between is not None:
            between(value)
        if self._slots.have_backward(loss):
            self._scaled(loss).backward()
        return value

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scale is None else self._scale(loss)

    def _on_the_side(
        self, batch: Sequence[Any], between: Callable[[Tensor], None] | None
    ) -> Tensor:
        """Make the passes on the stream of captures, so that nothing there is met first in one."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            loss = self._passes(batch, between)
        now.wait_stream(self._stream)
        return loss

    def _capture(self, window: "_Window", batch: Sequence[Any]) -> None:
        """Capture the passes, of which nothing runs; waits for the device."""
        if _any_learns(batch):
            self._refuse(window, _BATCH_LEARNS)
            return
        started = time.perf_counter()
        structure, now = self._slots.structure(), torch.cuda.current_stream(self._device)
        placement, names = self._placements.number(), self._placements.names()
        inputs = map_tensors(torch.clone, tuple(batch))
        try:
            graph = self._graph(inputs)
        except Exception as error:  # noqa: BLE001 – whatever cannot be captured runs eagerly
            self._refuse(window, told(error))
            self._clear_away(now)
            return
        if self._slots.structure() != structure:  # a seed's forward has raised in the capture
            return
        if self._placements.number() != placement:
            self._placements.give_back(names)  # what a capture computes has no values
            self._refuse(window, _ASSIGNS)
            return
        if _any_learns(inputs):  # since the loss has seen it
            self._refuse(window, _BATCH_LEARNS)
            return
        if graph is None:  # eager steps are as fast
            window.refused = True
            return
        window.graph = graph
        taken = 1e3 * (time.perf_counter() - started)
        kept_graphs = sum(other.graph is not None for other in self._windows.values())
        self._events.append(StepCaptured(graphs=kept_graphs, milliseconds=taken))

    def _graph(self, inputs: Sequence[Any]) -> "_Graph | None":
        """Capture forward and backward of a batch; None if there is no backward."""
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._capturing(forward):
            loss = self._loss(*inputs)
            scaled = self._scaled(loss)
        if not self._slots.have_backward(loss):
            return None
        own = [p for p in self._slots.model.parameters() if p.requires_grad]
        learning = dict.fromkeys((*own, *_learning(scaled)))
        kept = [parameter.grad for parameter in learning]
        for parameter in learning:
            parameter.grad = None
        try:
            with self._capturing(backward):
                scaled.backward()
            gradients = [(p, p.grad) for p in learning if p.grad is not None]
        finally:
            for parameter, gradient in zip(learning, kept, strict=True):
                parameter.grad = gradient
        besides = [(p, p.data_ptr()) for p in learning.keys() - own]
        places = tuple(tensors_in(inputs))
        return _Graph(forward, backward, places, loss.detach(), gradients, besides)

    def _refuse(self, window: "_Window", reason: str) -> None:
        """Let the steps of a window run eagerly from now on, and tell why."""
        window.refused = True
        self._events.append(CompileFailed(place=_PLACE, blueprint=None, error=reason))

    def _clear_away(self, stream: torch.cuda.Stream) -> None:
        """Undo what torch leaves behind where ending a capture fails.

        That is the capture's stream as the current one, memory that is still allocated for it, and
        random streams that believe a capture is under way, which another one ends.
        """
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # noqa: SLF001
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            torch.zeros(1, device=self._device)

    def _capturing(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        # A loader's thread may pin memory meanwhile, which a global capture would not survive.
        return torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )


@dataclass(slots=True)
class _Window:
    """What is known of steps in which nothing but values differs."""

    steps: int = 0
    refused: bool = False
    graph: "_Graph | None" = None


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step, and the memory that it reads and writes."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    loss: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    besides: list[tuple[Tensor, int]]
    """What learns and is not the model's, and where it lies."""

    def besides_changed(self) -> bool:
        """Return whether something besides the model lies elsewhere, or does not learn any more."""
        return any(t.data_ptr() != place or not t.requires_grad for t, place in self.besides)

    def replay(self, batch: Iterable[Tensor], between: Callable[[Tensor], None] | None) -> Tensor:
        """Make the step on other values."""
        for place, values in zip(self.inputs, batch, strict=True):
            place.copy_(values, non_blocking=True)
        # Copies, since another graph may have left them where this one works.
        before = [(g, p.grad.clone()) for p, g in self.gradients if p.grad is not None]
        self.forward.replay()
        loss = self.loss.clone()
        if between is not None:
            between(loss)
        self.backward.replay()
        for gradient, earlier in before:
            gradient.add_(earlier)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return loss


def _any_learns(batch: Sequence[Any]) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(batch))


def _learning(output: Tensor) -> Iterator[Tensor]:
    """Yield the tensors to whose `.grad` an output's backward adds."""
    nodes: list[Any] = [output.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == _ACCUMULATES:
            yield node.variable
        nodes += [following for following, _ in node.next_functions]
