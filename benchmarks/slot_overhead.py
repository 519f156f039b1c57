"""What does a slot cost in a training step? Against the same network written by hand.

Both sides run interleaved in one process, one step of each in turn, after a warm-up. Where their
weights and features come to lie in memory decides over 2 to 3 % of a step, for as long as they
live: so both are made anew several times, either of them first as often as the other. Shown are the
medians, and the ratio of medians within blocks of steps, which a machine that becomes slower on the
way does not change: its median over blocks, and its middle half. By hand is always a plain network
without esper:

- twice by hand: against itself, which tells what the machine adds;
- dormant: the host alone;
- live, at alpha 1: the host with the seed inlined, `h + f(h)`;
- training: the host, with the seed run on detached features and trained by a straight-through
  function of the plain kind (gradient to both, no proximal term);
- training, pulled: training once more, against a straight-through function that has that term;
- training, plain: a seed without that term, against a function without it;
- training, guarded: that against one by hand which keeps what isolation promises, too: the seed's
  gradients are looked at as they arrive, and it has a parameter group, and so a learning rate, of
  its own;
- host plus seed: and again, against the host with the seed inlined, which it must not
  exceed;
- blended, of a seed that was behind the host: `h + a * f(h.detach())` with a in a 0-dim buffer;
- committed: the host with the seed inlined; baked: the same after `esper.bake`.

With `--compile whole` both sides are one graph each. With `--compile regional` a `CompiledHost`
stands against a network whose blocks are compiled each alone, and so is what mixes the seed in;
the same network compiled whole is a second yardstick. A baked network is plain: both sides compile
its blocks, the seed's with the seed inside. With `--compile captured`, on a GPU, forward and
backward are CUDA graphs on both sides, ours by a `CapturedStep`.

With `--smallest-batch` next to nothing is left of the kernels, and what our side takes more is told
in µs, with the lowest and the highest of the pairs: it is as much in a step of any length, where a
ratio of steps hides it in what else the machine does.

Without `--compile` the call of a dormant slot is timed alone too: an identity with a slot behind it
against one without, many calls of each in turn.

    python benchmarks/slot_overhead.py [--host cnn decoder llama] [--stage dormant live …]
        [--steps 200] [--pairs 10] [--compile whole|regional|captured] [--device cpu]
        [--smallest-batch]
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import esper
from esper.compilation import CapturedStep, CompiledHost
from esper.experiments.timing import ratio_over_blocks, timed_in_turn
from esper.lifecycle.events import CompileFailed
from speed_hosts import (
    HOSTS,
    Behind,
    Blended,
    BlockWithSeed,
    GuardedBehind,
    Inlined,
    Mix,
    PulledBehind,
    SpeedHost,
    hand_written,
    with_smallest_batch,
)

BLOCK_STEPS = 20
WARM_UP_STEPS = 5
COMPILED_PAIRS = 2
"""How often both sides are made where that takes the compiler's time."""
CALLS = 1000
ROUNDS = 201
BACKEND = "inductor"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How a slot's seed stands, and what it is held against."""

    advances: int | None
    """Stages after GERMINATED; None leaves the slot dormant."""
    mix: type[Mix] | None
    """By hand; None is the host alone."""
    isolation: str = "shadowing"
    objective: str = "proximal"
    alpha: float | None = None
    """Where it is not the stage's own."""
    baked: bool = False
    twice: bool = False
    """Both sides are by hand."""


STAGES = {
    "twice by hand": Stage(advances=None, mix=Behind, twice=True),
    "dormant": Stage(advances=None, mix=None),
    "live": Stage(advances=2, mix=Inlined, isolation="none", alpha=1.0),
    "training": Stage(advances=1, mix=Behind),
    "training, pulled": Stage(advances=1, mix=PulledBehind),
    "training, plain": Stage(advances=1, mix=Behind, objective="plain"),
    "training, guarded": Stage(advances=1, mix=GuardedBehind, objective="plain"),
    "host plus seed": Stage(advances=1, mix=Inlined),
    "blended": Stage(advances=2, mix=Blended, alpha=0.5),
    "committed": Stage(advances=5, mix=Inlined),
    "baked": Stage(advances=5, mix=Inlined, baked=True),
}


def slotted(host: SpeedHost, stage: Stage) -> tuple[nn.Module, esper.SlotSet | None]:
    """Return a copy of the model with its two slots, the target's in a stage, or baked."""
    model = copy.deepcopy(host.model)
    slots = esper.attach(
        model,
        [host.target, host.dormant],
        example=host.inputs[:2],
        config=esper.SlotConfig(isolation=stage.isolation, objective=stage.objective),
    )
    if stage.advances is not None:
        slot = slots[host.target]
        slot.germinate(host.blueprint)
        for _ in range(stage.advances):
            slot.advance(force=True)
        if stage.alpha is not None:
            slot.set_alpha_target(stage.alpha, 0)
    return (esper.bake(model), None) if stage.baked else (model, slots)


class Side:
    """One network with its optimizer.

    Args:
        host: Its batch and loss.
        model: What is trained.
        slots: Of the model; None for one without.
        forward: Is called instead of the model.
        compiled: Prepares the slots' seeds between two steps.
        captured: Whether forward and backward are CUDA graphs.
    """

    def __init__(
        self,
        host: SpeedHost,
        model: nn.Module,
        *,
        slots: esper.SlotSet | None = None,
        forward: nn.Module | None = None,
        compiled: CompiledHost | None = None,
        captured: bool = False,
    ) -> None:
        self.host = host
        self.slots = slots
        self.compiled = compiled
        self._forward = model if forward is None else forward
        fused = host.inputs.is_cuda  # else each parameter group is a dozen launches more
        groups = [{"params": list(parameters)} for parameters in owned_parameters(model)]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=fused)
        if slots is not None:
            slots.bind(self._optimizer)
        self._passes: Callable[[Tensor, Tensor], object] = self._eagerly
        if captured:
            self._passes = (
                CaptureByHand(self._loss, host, list(model.parameters()))
                if slots is None
                else CapturedStep(slots, self._loss)
            )

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.host.loss(self._forward(inputs), labels)

    def _eagerly(self, inputs: Tensor, labels: Tensor) -> None:
        self._loss(inputs, labels).backward()

    def step(self) -> None:
        """Make one training step.

        Raises:
            RuntimeError: Something of esper's would run uncompiled.
        """
        host = self.host
        self._passes(host.inputs, host.labels)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.slots is not None:
            self.slots.tick()
        if self.compiled is not None and self.compiled.due():
            failed = [e for e in self.compiled.prepare() if isinstance(e, CompileFailed)]
            if failed:
                raise RuntimeError(f"{failed[0].place} does not compile: {failed[0].error}")
        if host.inputs.is_cuda:
            torch.cuda.synchronize()


def owned_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of the host, and apart from them those of a guarded seed by hand."""
    guarded = [mix for mix in model.modules() if isinstance(mix, GuardedBehind)]
    apart = [parameter for mix in guarded for parameter in mix.parameters()]
    own = set(apart)
    host = [parameter for parameter in model.parameters() if parameter not in own]
    return [host, apart] if apart else [host]


class CaptureByHand:
    """Forward and backward of a plain network as one CUDA graph."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        host: SpeedHost,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._inputs, self._labels = host.inputs.clone(), host.labels.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                loss(self._inputs, self._labels).backward()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        for parameter in parameters:
            parameter.grad = None
        with torch.cuda.graph(self._graph):
            value = loss(self._inputs, self._labels)
            value.backward()
        self._value = value.detach()
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._value.clone()


def with_slots(host: SpeedHost, stage: Stage, mode: str) -> Side:
    """Return our side, compiled in a mode."""
    if stage.twice:
        return by_hand(host, stage, mode)
    model, slots = slotted(host, stage)
    if mode == "whole":
        return Side(host, model, slots=slots, forward=compiled_whole(model))
    if mode == "regional":
        if slots is not None:
            return Side(host, model, slots=slots, compiled=CompiledHost(slots, backend=BACKEND))
        compile_blocks(host, model, seed_apart=False)
    return Side(host, model, slots=slots, captured=mode == "captured")


def by_hand(host: SpeedHost, stage: Stage, mode: str) -> Side:
    """Return the other side, compiled in a mode."""
    model = hand_written(host, stage.mix)
    if mode == "whole":
        return Side(host, model, forward=compiled_whole(model))
    if mode == "regional":
        compile_blocks(host, model, seed_apart=not stage.baked)
    return Side(host, model, captured=mode == "captured")


def compiled_whole(model: nn.Module) -> nn.Module:
    """Return the model as one graph."""
    return torch.compile(model, fullgraph=True, backend=BACKEND)


def compile_blocks(host: SpeedHost, model: nn.Module, *, seed_apart: bool) -> None:
    """Compile each block of a plain network alone, a seed with its block or apart from it."""
    for path in host.blocks:
        block = model.get_submodule(path)
        inside = seed_apart and isinstance(block, BlockWithSeed)
        for part in block.children() if inside else (block,):
            part.compile(fullgraph=True, backend=BACKEND)


def compare(sides: Sequence[Side], steps: int) -> list[list[float]]:
    """Return each side's seconds per step, measured in turn."""
    timed_in_turn([side.step for side in sides], WARM_UP_STEPS)
    assert not any(side.compiled is not None and side.compiled.due() for side in sides)
    return timed_in_turn([side.step for side in sides], steps)


def measure(
    host: SpeedHost, stage: Stage, mode: str, *, steps: int, pairs: int
) -> list[list[float]]:
    """Return the seconds per step of ours and the others, each made anew for every pair."""
    makers = [lambda: with_slots(host, stage, mode), lambda: by_hand(host, stage, mode)]
    if mode == "regional":
        makers.append(lambda: by_hand(host, stage, "whole"))
    times: list[list[float]] = [[] for _ in makers]
    for pair in range(pairs):
        torch.compiler.reset()
        order = range(len(makers)) if pair % 2 == 0 else reversed(range(len(makers)))
        made = {which: makers[which]() for which in order}
        measured = compare([made[which] for which in range(len(makers))], steps // pairs)
        for all_of_side, of_pair in zip(times, measured, strict=True):
            all_of_side.extend(of_pair)
    return times


def ratio_cells(ours: list[float], theirs: list[float]) -> list[str]:
    """Return the other side's milliseconds, and the ratio over blocks: median and middle half."""
    ratio = ratio_over_blocks(blocks_of(ours), blocks_of(theirs))
    return [
        f"{1e3 * statistics.median(theirs):.2f}",
        f"{ratio.median:.3f}",
        f"{ratio.low:.3f} – {ratio.high:.3f}",
    ]


def blocks_of(times: list[float]) -> list[list[float]]:
    """Return times of neighbouring steps together."""
    starts = range(0, len(times), BLOCK_STEPS)
    return [times[start : start + BLOCK_STEPS] for start in starts]


def stage_table(
    host: SpeedHost, stages: Sequence[str], mode: str, *, steps: int, pairs: int
) -> Table:
    """Measure stages on one host."""
    table = Table(box=None, header_style="dim")
    table.add_column("stage")
    yardsticks = ["by hand", "whole, by hand"] if mode == "regional" else ["by hand"]
    for column in ("slot ms", *(f"{name} ms\nratio\nmiddle half" for name in yardsticks)):
        for part in column.split("\n"):
            table.add_column(part, justify="right")
    for name in stages:
        ours, *theirs = measure(host, STAGES[name], mode, steps=steps, pairs=pairs)
        cells = [cell for times in theirs for cell in ratio_cells(ours, times)]
        table.add_row(name, f"{1e3 * statistics.median(ours):.2f}", *cells)
    return table


def own_time_table(
    host: SpeedHost, stages: Sequence[str], mode: str, *, steps: int, pairs: int
) -> Table:
    """Measure what our side takes more in a step without a batch worth the name."""
    table = Table(box=None, header_style="dim")
    table.add_column("stage")
    for column in ("slot µs", "by hand µs", "more", "lowest – highest"):
        table.add_column(column, justify="right")
    for name in stages:
        ours, theirs, *_ = measure(host, STAGES[name], mode, steps=steps, pairs=pairs)
        of_pairs = [
            [
                1e6 * statistics.median(times[pair * steps // pairs :][: steps // pairs])
                for times in (ours, theirs)
            ]
            for pair in range(pairs)
        ]
        more = [slot - plain for slot, plain in of_pairs]
        slot, plain = (statistics.median(side) for side in zip(*of_pairs, strict=True))
        table.add_row(
            name,
            f"{slot:.0f}",
            f"{plain:.0f}",
            f"{statistics.median(more):.0f}",
            f"{min(more):.0f} – {max(more):.0f}",
        )
    return table


def dormant_call() -> str:
    """Return what a dormant slot adds to the call of a module that does nothing."""
    features = torch.zeros(2, 4)
    host = nn.Sequential(nn.Identity())
    esper.attach(host, "0", example=features)
    modules = (host[0], nn.Identity())

    def called(module: nn.Module) -> None:
        for _ in range(CALLS):
            module(features)

    seconds = timed_in_turn([partial(called, module) for module in modules], ROUNDS)
    seconds = [[of_round / CALLS for of_round in times] for times in seconds]
    more = [1e6 * (slot - plain) for slot, plain in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(more, n=4)
    slot, plain = (1e6 * statistics.median(times) for times in seconds)
    return (
        f"a dormant slot's call: {middle:.2f} µs more, {slot:.2f} against {plain:.2f} "
        f"(middle half of {ROUNDS} rounds: {low:.2f} – {high:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--compile", choices=("whole", "regional", "captured"), dest="mode", default="eager"
    )
    parser.add_argument("--pairs", type=int, help="default: one per block; 2 where compiled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smallest-batch", action="store_true")
    options = parser.parse_args()
    pairs = options.pairs
    if pairs is None:
        pairs = options.steps // BLOCK_STEPS if options.mode == "eager" else COMPILED_PAIRS
    if options.steps < 2 * BLOCK_STEPS or pairs < 1 or options.steps % (pairs * BLOCK_STEPS):
        parser.error(
            f"--steps must be a multiple of the pairs, {pairs}, times {BLOCK_STEPS}, and at least "
            f"{2 * BLOCK_STEPS}, two blocks"
        )
    console = Console(width=110)
    compiled = options.mode in ("whole", "regional")
    mode = f"compiled, {options.mode}" if compiled else options.mode
    console.print(
        f"{mode}, {options.device}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {options.steps} steps each, {pairs} pairs; esper {esper.__version__}"
    )
    for name in options.host:
        torch.manual_seed(0)
        host = HOSTS[name](options.device)
        console.print(f"\n{name}, {host.blueprint} behind {host.target}")
        if options.smallest_batch:
            host, tell = with_smallest_batch(host), own_time_table
        else:
            tell = stage_table
        console.print(tell(host, options.stage, options.mode, steps=options.steps, pairs=pairs))
    if options.mode == "eager":
        console.print(f"\n{dormant_call()}")


if __name__ == "__main__":
    main()
