"""What does a slot cost in a training step? Against the same module written by hand.

Every pair runs interleaved in one process, one step of each in turn, after a warm-up. Shown are the
medians, the ratio of medians, and the spread of the ratio over blocks of steps (its interquartile
range). `hand-written` is always a plain module without esper:

- dormant: the host alone;
- training: the host, with the seed run on detached features and trained by a straight-through
  function of the plain kind (gradient to both, no proximal term);
- host plus seed: the host with the seed inlined, `h + f(h)`; what TRAINING must not exceed;
- blended, of a seed that was behind the host: `h + a * f(h.detach())` with a in a 0-dim buffer;
- live, at alpha 1: the host with the seed inlined, `h + f(h)`;
- committed: the host with the seed inlined; baked: the same after `esper.bake`.

    python benchmarks/slot_overhead.py [--steps 200] [--compile] [--device cpu]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import esper
from esper.seeds import Family, Seed, blueprints

WIDTH = 64
BATCH = 16
SIDE = 32
BLUEPRINT = "conv_light"
BLOCK_STEPS = 20


class Host(nn.Module):
    """A residual CNN whose training step takes tens of milliseconds on two cores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.block1 = Block()
        self.block2 = Block()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.block2(self.block1(self.stem(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """Convolution, BatchNorm and ReLU with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.relu(self.norm(self.convolution(features)))


class PlainStraightThrough(torch.autograd.Function):
    """Forward the host; the same gradient to both."""

    @staticmethod
    def forward(ctx: object, features: Tensor, increment: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


class HandWritten(nn.Module):
    """The host's block with a seed written into it."""

    def __init__(self, block: nn.Module, seed: Seed, kind: str) -> None:
        super().__init__()
        self.block = block
        self.seed = seed
        self.kind = kind
        self.register_buffer("alpha", torch.tensor(0.5))

    def forward(self, features: Tensor) -> Tensor:
        features = self.block(features)
        if self.kind == "training":
            return PlainStraightThrough.apply(features, self.seed.increment(features.detach()))
        if self.kind == "blended":
            return features + self.alpha * self.seed.increment(features.detach())
        return features + self.seed.increment(features)


@dataclass
class Side:
    """One network with its optimizer, ready to step."""

    step: Callable[[], None]


def hand_written(kind: str, host: Host, device: str) -> nn.Module:
    """Return a copy of the host with the seed written in after its first block."""
    model = copy.deepcopy(host)
    if kind != "dormant":
        seed = blueprints.create(Family.CNN, BLUEPRINT, WIDTH).to(device)
        model.block1 = HandWritten(model.block1, seed, kind)
    return model


def slotted(kind: str, host: Host, example: Tensor) -> tuple[nn.Module, esper.SlotSet | None]:
    """Return a copy of the host with slots, its first one in the stage asked for, or baked."""
    model = copy.deepcopy(host)
    isolation = "none" if kind == "live" else "shadowing"
    config = esper.SlotConfig(isolation=isolation)
    slots = esper.attach(model, ["block1", "block2"], example=example, config=config)
    stages = {"dormant": 0, "training": 1, "host plus seed": 1, "blended": 2, "live": 2}
    stages |= {"committed": 5, "baked": 5}
    if stages[kind]:
        slots["block1"].germinate(BLUEPRINT)
        for _ in range(stages[kind]):
            slots["block1"].advance(force=True)
    if kind in ("blended", "live"):
        slots["block1"].set_alpha_target(0.5 if kind == "blended" else 1.0, 0)
    if kind == "baked":
        return esper.bake(model), None
    return model, slots


def side(
    model: nn.Module, slots: esper.SlotSet | None, images: Tensor, labels: Tensor, compiled: bool
) -> Side:
    """Return a closure that makes one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if slots is not None:
        slots.bind(optimizer)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        nn.functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if slots is not None:
            slots.tick()
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return Side(step)


def compare(first: Side, second: Side, steps: int) -> tuple[list[float], list[float]]:
    """Return both sides' seconds per step, measured in turn."""
    for _ in range(BLOCK_STEPS):
        first.step()
        second.step()
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(steps):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        for which in order:
            started = time.perf_counter()
            (first, second)[which].step()
            times[which].append(time.perf_counter() - started)
    return times


def block_ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the ratio of medians in each block of steps."""
    starts = range(0, len(ours) - BLOCK_STEPS + 1, BLOCK_STEPS)
    return [
        statistics.median(ours[start : start + BLOCK_STEPS])
        / statistics.median(theirs[start : start + BLOCK_STEPS])
        for start in starts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    host = Host().to(options.device)
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=options.device)
    labels = torch.randint(0, 10, (BATCH,), device=options.device)
    table = Table(box=None, header_style="dim")
    for column in ("stage", "slot ms", "hand-written ms", "ratio", "ratio, middle half of blocks"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    kinds = ("dormant", "live", "training", "host plus seed", "blended", "committed", "baked")
    for kind in kinds:
        torch.compiler.reset()
        model, slots = slotted(kind, host, images[:2])
        ours = side(model, slots, images, labels, options.compiled)
        plain = hand_written(kind, host, options.device)
        theirs = side(plain, None, images, labels, options.compiled)
        mine, other = compare(ours, theirs, options.steps)
        ratios = block_ratios(mine, other)
        low, _, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            kind,
            f"{1e3 * statistics.median(mine):.2f}",
            f"{1e3 * statistics.median(other):.2f}",
            f"{statistics.median(mine) / statistics.median(other):.3f}",
            f"{low:.3f} – {high:.3f}",
        )
    console = Console(width=100)
    mode = "compiled" if options.compiled else "eager"
    console.print(
        f"{mode}, {options.device}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {options.steps} steps each"
    )
    console.print(table)


if __name__ == "__main__":
    main()
