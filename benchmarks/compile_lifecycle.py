"""How many graphs does a seed's life cost, and which step waits for them?

A seed that trains behind the host goes through its whole life in a slot, with one slot attached and
with four: dormant, behind the host, blended with alpha moving at every step, on probation,
committed. Then an equal one does so in another slot, is pruned, and germinates again. Two ways:

- whole: `torch.compile(model, fullgraph=True)`, one graph for each combination of what slots do;
- regional: `esper.compilation.CompiledHost` with its service, a worker process that compiles
  meanwhile; seeds are waited for here before their life goes on, as if they had been foreseen.

Shown for each part of a life: new graphs; of the first step after the change, how much longer it
took than the median of the following ones; and for a seed, how long the run itself was held up
between two steps (prewarm).

Then `--epochs` epochs with `--germinations` seeds of four blueprints over four slots, regional: how
many graphs, what the compiler refused, and how many compiled in a step. A graph that a step waits
for, or one that the compiler refuses, is an error.

    python benchmarks/compile_lifecycle.py [--host cnn decoder llama] [--backend inductor]
        [--slots 1 4] [--how whole regional] [--epochs 200] [--germinations 20] [--device cpu]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from esper import SeedStage, SlotConfig
from esper.compilation import ArtefactStore, CompiledHost, CompileService
from esper.compilation.inductor_cache import CACHE_VARIABLE
from esper.lifecycle.events import CompileFailed, SeedCompiled
from esper.signing import Keyring
from speed_hosts import CHANNELS, HOSTS, CNNBlock, SpeedHost

STEADY_STEPS = 12
NUM_SLOTS = 4
BLUEPRINTS = {"cnn": ("conv_light", "norm", "depthwise", "bottleneck")}
OTHER_BLUEPRINTS = ("mlp", "norm", "lora", "mlp_small")


class FourBlocks(nn.Module):
    """A stem, four residual blocks and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.Sequential(*(CNNBlock() for _ in range(NUM_SLOTS)))
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits


class Part(NamedTuple):
    """One part of a life."""

    name: str
    graphs: int
    """New ones, in a step or before it."""
    in_steps: int
    """Of these, such that a step has waited for."""
    first: float
    """The first step after the change over the median of those that follow."""
    prewarm_ms: float


class Side:
    """A host that grows, with its optimizer and whoever compiles it."""

    def __init__(self, host: SpeedHost, num_slots: int) -> None:
        self.host = host
        model = FourBlocks() if host.family == "cnn" else host.model
        paths = [f"blocks.{index}" for index in range(NUM_SLOTS)]
        paths = paths if host.family == "cnn" else list(host.blocks)
        self.model = model.to(host.inputs.device).train()
        self.slots = esper.attach(
            self.model,
            paths[:num_slots],
            example=host.inputs[:2],
            config=SlotConfig(isolation="shadowing", embargo_epochs=0, max_committed=100),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.slots.bind(self.optimizer)
        self.call: Callable[[Tensor], Any] = self.model
        self.compiled: CompiledHost | None = None
        self.events: list[Any] = []
        self.in_steps = 0

    def step(self) -> float:
        """Make one step, and then what is due between two; return the step's seconds."""
        before, started = graphs(), time.perf_counter()
        self.host.loss(self.call(self.host.inputs), self.host.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()
        if self.host.inputs.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.in_steps += graphs() - before
        if self.compiled is not None and self.compiled.due():
            self.events += self.compiled.prepare()
        return seconds

    def settle(self) -> None:
        """Step until nothing is waited for any more."""
        if self.compiled is not None:
            while self.compiled.pending:
                self.step()

    def part(self, name: str, change: Callable[[], object]) -> Part:
        """Make a change and measure what the steps after it cost."""
        before, known = graphs(), len(self.events)
        change()
        self.in_steps = 0
        first = self.step()
        steady = statistics.median(self.step() for _ in range(STEADY_STEPS))
        prewarm = sum(
            event.milliseconds for event in self.events[known:] if isinstance(event, SeedCompiled)
        )
        return Part(name, graphs() - before, self.in_steps, first / steady, prewarm)

    def life(self, path: str, blueprint: str) -> Iterator[Part]:
        """Take a seed through its life."""
        slot = self.slots[path]

        def germinate() -> None:
            slot.germinate(blueprint)
            self.settle()

        def blend() -> None:
            slot.advance(force=True)
            slot.set_alpha_target(1.0, STEADY_STEPS)

        yield self.part("germinated, and compiled", germinate)
        yield self.part("behind the host", lambda: slot.advance(force=True))
        yield self.part("blended, alpha moving", blend)
        yield self.part("frozen", lambda: slot.advance(force=True))
        yield self.part("on probation", lambda: slot.advance(force=True))
        yield self.part("committed", slot.commit)

    def pruned_and_back(self, path: str, blueprint: str) -> Iterator[Part]:
        """Prune a seed that trains, and let an equal one germinate and train."""
        slot = self.slots[path]

        def grow() -> None:
            slot.germinate(blueprint)
            self.settle()
            slot.advance(force=True)

        def prune() -> None:
            slot.prune()
            while slot.stage is not SeedStage.DORMANT:
                slot.advance(force=True)

        yield self.part("an equal one behind the host", grow)
        yield self.part("pruned", prune)
        yield self.part("back again", grow)


def graphs() -> int:
    """Return how many graphs dynamo has made."""
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def service_in(folder: Path) -> Iterator[CompileService]:
    """Yield a service with a store, and a compiler's folder, of its own."""
    os.environ[CACHE_VARIABLE] = str(folder / "inductor")
    store = ArtefactStore(str(folder / "store"), Keyring([os.urandom(32)]))
    with CompileService(store) as service:
        yield service


def lives(host: SpeedHost, num_slots: int, how: str, backend: str, folder: Path) -> list[Part]:
    """Return what the lives cost, compiled whole or by region."""
    torch.compiler.reset()
    side = Side(host, num_slots)
    first, second = (list(side.slots)[index] for index in (0, -1))

    def all_parts() -> list[Part]:
        parts = [side.part("dormant", lambda: None), *side.life(first, host.blueprint)]
        if how == "regional" or num_slots == 1:  # whole, a second slot is one more combination each
            return [*parts, *side.pruned_and_back(second, host.blueprint)]
        return parts

    if how == "whole":
        os.environ[CACHE_VARIABLE] = str(folder / "inductor")
        side.call = torch.compile(side.model, fullgraph=True, backend=backend)
        return all_parts()
    with service_in(folder) as service:
        side.compiled = CompiledHost(side.slots, service=service, backend=backend)
        parts = all_parts()
    _refuse_failures(side.events)
    return parts


def long_run(
    host: SpeedHost, name: str, *, epochs: int, germinations: int, backend: str, folder: Path
) -> str:
    """Return in words what many seeds over many epochs cost."""
    torch.compiler.reset()
    side = Side(host, NUM_SLOTS)
    blueprints = BLUEPRINTS.get(name, OTHER_BLUEPRINTS)
    paths = list(side.slots)
    with service_in(folder) as service:
        side.compiled = CompiledHost(side.slots, service=service, backend=backend)
        side.step()
        host_graphs, side.in_steps, grown = graphs(), 0, 0
        before = host_graphs
        for epoch in range(epochs):
            if epoch * germinations // epochs == grown:
                slot = side.slots[paths[grown % NUM_SLOTS]]
                if slot.seed is not None:
                    _end(slot, commit=grown % 3 == 0)
                slot.germinate(blueprints[grown % len(blueprints)])
                grown += 1
                side.settle()
            for slot in side.slots.values():
                if slot.seed is not None and slot.stage in _GOING_ON:
                    slot.advance(force=True)
                    if slot.stage is SeedStage.BLENDING:
                        slot.set_alpha_target(1.0, 2)
            side.step()
            side.step()
    _refuse_failures(side.events)
    if side.in_steps:
        raise RuntimeError(f"{side.in_steps} graphs were waited for in a step")
    sources = Counter(event.source for event in side.events if isinstance(event, SeedCompiled))
    prewarm = [event.milliseconds for event in side.events if isinstance(event, SeedCompiled)]
    return (
        f"{name}: {epochs} epochs, {grown} germinations over {NUM_SLOTS} slots: "
        f"{graphs() - before} graphs for seeds, none in a step, none refused; "
        f"sources {dict(sources)}; held up {statistics.median(prewarm):.0f} ms per seed "
        f"(largest {max(prewarm):.0f})"
    )


_GOING_ON = (SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING)


def _end(slot: Any, *, commit: bool) -> None:
    if not commit:
        slot.prune()
    while slot.stage not in (SeedStage.DORMANT, SeedStage.FOSSILIZED):
        if slot.stage is SeedStage.PROBATIONARY:
            slot.commit()
        else:
            slot.advance(force=True)


def _refuse_failures(events: Sequence[Any]) -> None:
    failures = [event for event in events if isinstance(event, CompileFailed)]
    if failures:
        raise RuntimeError(f"the compiler refused: {failures}")


def table(name: str, num_slots: int, how: str, parts: Sequence[Part]) -> Table:
    """Return the parts of lives, a row for each."""
    slots = "1 slot" if num_slots == 1 else f"{num_slots} slots"
    shown = Table(title=f"{name}, {slots}, {how}", title_justify="left", box=None)
    for column in ("part", "new graphs", "waited for in a step", "first step", "prewarm"):
        shown.add_column(column, justify="left" if column == "part" else "right")
    for part in parts:
        prewarm = f"{part.prewarm_ms:.0f} ms" if part.prewarm_ms else ""
        shown.add_row(
            part.name, str(part.graphs), str(part.in_steps), f"{part.first:.2f}×", prewarm
        )
    total = sum(part.graphs for part in parts)
    shown.add_row("all", str(total), str(sum(part.in_steps for part in parts)), "", "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", nargs="+", choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--slots", nargs="+", type=int, default=[1, NUM_SLOTS])
    parser.add_argument("--how", nargs="+", default=["whole", "regional"])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--germinations", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    console = Console()
    console.print(
        f"{arguments.device}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"esper {esper.__version__}"
    )
    for name in arguments.host:
        for num_slots in arguments.slots:
            for how in arguments.how:
                torch.manual_seed(0)
                with tempfile.TemporaryDirectory() as folder:
                    host = HOSTS[name](arguments.device)
                    parts = lives(host, num_slots, how, arguments.backend, Path(folder))
                console.print(table(name, num_slots, how, parts))
        if not arguments.germinations:
            continue
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            told = long_run(
                HOSTS[name](arguments.device),
                name,
                epochs=arguments.epochs,
                germinations=arguments.germinations,
                backend=arguments.backend,
                folder=Path(folder),
            )
        console.print(told, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
