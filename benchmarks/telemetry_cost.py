"""What share of a training step do telemetry, and growth's own bookkeeping, take?

Two copies of one network, each with a seed in TRAINING behind one block and a dormant slot behind
another, step in turn in one process, with the same optimizer groups. One has all that growth does
with a step; the other has none of it. Both guard the seed's gradients. After each block of steps,
as many as the text task makes between two decisions, the first one decides; of that only what its
sinks take counts. Shown are

- difference: between two neighbouring steps, one with and one without; on a busy machine it says
  less than the next;
- telemetry: measuring and telling – gradient norms, operations and seconds of the run, times of
  steps, and a run folder as a sink;
- growth: what would have to be done if nothing were measured – alpha and stages move, seeds have
  learning rates of their own, passes beside the step are asked for.

The last two are what the calls take by themselves, right where they stand in the step, with caches
as the backward leaves them, less what reading the clock takes there. Of the steps in a block in
which gradient norms are due, and of those in which they are not, the median counts, as often as
they come. The figures are medians over blocks, per step and as a share of a step without, and that
share's middle half.

    python benchmarks/telemetry_cost.py [--host cnn decoder] [--samples 16] [--steps 1000]
        [--device cpu]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import esper
from esper.lifecycle.actions import Action, GrowthState
from esper.lifecycle.events import EventRecord
from esper.telemetry import RunStore
from slot_overhead import STAGES, slotted
from speed_hosts import HOSTS, SpeedHost

BLOCK_STEPS = 100
"""A whole number of the intervals in which gradient norms are measured."""


class Stopwatch:
    """Adds up the seconds of what it is held around."""

    def __init__(self) -> None:
        self.stops = 0
        self._seconds = 0.0
        self._started = 0.0

    def start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def stop(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self.stops += 1

    __enter__ = start
    __exit__ = stop

    def around(self, owner: object, name: str) -> None:
        """Time every call of a method of one object."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return method(*args, **kwargs)

        setattr(owner, name, timed)

    def take(self) -> float:
        """Return the seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class TimedSink:
    """Passes everything on to a run folder, and takes the time."""

    def __init__(self, store: RunStore, watch: Stopwatch) -> None:
        self._store = store
        self._watch = watch

    def publish(self, record: EventRecord) -> None:
        with self._watch:
            self._store.publish(record)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        with self._watch:
            self._store.measure(epoch, step, metrics)

    def flush(self) -> None:
        with self._watch:
            self._store.flush()


class Waiting:
    """A policy under which every seed stays where it is."""

    def decide(self, state: GrowthState) -> Sequence[Action]:
        return ()


class Plain:
    """A training loop without telemetry."""

    def __init__(self, host: SpeedHost) -> None:
        self.host = host
        self.hooks, self.nothing = Stopwatch(), Stopwatch()
        self.model, self.slots = slotted(host, STAGES["training"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        # Hooks run in the order in which they were registered: growth's between these two.
        self._watch_hooks(self.hooks.start)
        self.bind()
        self._watch_hooks(self.hooks.stop)

    def bind(self) -> None:
        """Make one optimizer group per slot, as growth does, and leave no hook."""
        self.slots.bind(self.optimizer)
        self.slots.unbind()

    def _watch_hooks(self, hook: Callable[..., None]) -> None:
        self.optimizer.register_step_pre_hook(hook)
        self.optimizer.register_step_post_hook(hook)

    def loss(self) -> Tensor:
        return self.host.loss(self.model(self.host.inputs), self.host.labels)

    def step(self) -> None:
        with self.nothing:
            pass
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check_stage(self) -> None:
        """Assert that what was measured is a seed that learns behind the host."""
        assert self.slots[self.host.target].stage is esper.SeedStage.TRAINING


class Watched(Plain):
    """The same with telemetry."""

    def __init__(self, host: SpeedHost, store: RunStore) -> None:
        self.after_step, self.meter, self.beside = Stopwatch(), Stopwatch(), Stopwatch()
        self.sinks, self.times = Stopwatch(), Stopwatch()
        self.asked, self.norms = Stopwatch(), Stopwatch()
        self._store = store
        super().__init__(host)

    def bind(self) -> None:
        self.growth = esper.Growth(
            self.slots,
            self.optimizer,
            policy=Waiting(),
            sinks=[TimedSink(self._store, self.sinks)],
            count_flops=True,
        )
        # Asked for in each step, made once or twice: a check is no telemetry.
        self.growth.isolation_monitor.interval_steps = 10**9
        self.growth.meter.start()
        self.asked.around(self.slots.gradient_health, "step_is_due")
        self.norms.around(self.slots.gradient_health, "measure")
        self.times.around(self.growth._step_times, "step")  # noqa: SLF001

    def step(self) -> None:
        growth, meter = self.growth, self.meter
        meter.start()
        with growth.meter.step([(self.host.inputs, self.host.labels)]):
            meter.stop()
            with self.beside:
                growth.check_isolation(self.loss)
                growth.shadow_pass(self.loss)
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            meter.start()
        meter.stop()
        with self.after_step:
            growth.after_step()

    def decide(self) -> None:
        self.growth.after_epoch(self._evaluate)

    def _evaluate(self) -> float:
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            loss = float(self.loss())
        self.model.train(was_training)
        return loss


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a step took in one block of them, in seconds."""

    step: float
    """Without telemetry."""
    difference: float
    telemetry: Mapping[str, float]
    """Its parts, by name."""
    growth: Mapping[str, float]
    """Parts of what growth does besides."""


def measure(watched: Watched, plain: Plain) -> Block:
    """Make one block of steps, and the decision after it."""
    for loop in (watched, plain):  # a decision leaves other things in the caches
        loop.step()
    watches = (
        *(watched.hooks, watched.after_step, watched.meter, watched.beside),
        *(watched.norms, watched.asked, watched.times, plain.hooks, plain.nothing),
    )
    for watch in (*watches, watched.sinks):
        watch.take()
    times_of_steps: list[tuple[float, float]] = []
    taken: list[list[float]] = []
    due: list[bool] = []
    for index in range(BLOCK_STEPS):
        measured = watched.norms.stops
        pair = [0.0, 0.0]
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            pair[which] = step_seconds((watched, plain)[which])
        times_of_steps.append((pair[0], pair[1]))
        taken.append([watch.take() for watch in watches])
        due.append(watched.norms.stops > measured)
    watched.decide()
    hooks, after_step, meter, beside, norms, asked, times, no_hooks, nothing = (
        typical(seconds, due) for seconds in zip(*taken, strict=True)
    )
    return Block(
        step=statistics.median(without for _, without in times_of_steps),
        difference=typical([with_it - without for with_it, without in times_of_steps], due),
        telemetry={
            "gradient norms": norms + asked - nothing,
            "times of steps": times - nothing,
            "operations, seconds": meter - 2 * nothing,
            "sinks": watched.sinks.take() / BLOCK_STEPS,
        },
        growth={
            "optimizer hooks": hooks - no_hooks - norms - asked,  # the watch's own are part of both
            "after_step": after_step - nothing - times,
            "passes beside the step, not due": beside - nothing,
        },
    )


def step_seconds(loop: Plain) -> float:
    started = time.perf_counter()
    loop.step()
    if loop.host.inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def typical(values: Sequence[float], due: Sequence[bool]) -> float:
    """Return the mean value if each were the median of its kind, due or not."""
    kinds: dict[bool, list[float]] = {}
    for value, kind in zip(values, due, strict=True):
        kinds.setdefault(kind, []).append(value)
    return sum(len(kind) * statistics.median(kind) for kind in kinds.values()) / len(values)


def table_of(blocks: Sequence[Block]) -> Table:
    """Return every measure, over blocks."""
    table = Table(box=None, header_style="dim")
    table.add_column("")
    for column in ("µs a step", "of a step", "middle half of blocks"):
        table.add_column(column, justify="right")
    rows = {
        "difference": [block.difference for block in blocks],
    }
    for whole in ("telemetry", "growth"):
        parts: list[Mapping[str, float]] = [getattr(block, whole) for block in blocks]
        rows[whole] = [sum(part.values()) for part in parts]
        rows |= {f"  {name}": [part[name] for part in parts] for name in parts[0]}
    for name, seconds in rows.items():
        shares = [taken / block.step for taken, block in zip(seconds, blocks, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        table.add_row(
            name,
            f"{1e6 * statistics.median(seconds):.1f}",
            f"{middle:.3%}",
            f"{low:.3%} – {high:.3%}",
        )
    return table


def smaller(host: SpeedHost, samples: int | None) -> SpeedHost:
    """Return the host with so many samples in a batch; None leaves them as they are."""
    if samples is None:
        return host
    return replace(host, inputs=host.inputs[:samples], labels=host.labels[:samples])


def blocks_of(host: SpeedHost, steps: int) -> list[Block]:
    """Measure one host."""
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder) / "run", config={}, environment={})
        watched, plain = Watched(host, store), Plain(host)
        measure(watched, plain)  # the first steps and the first decision are slower
        blocks = [measure(watched, plain) for _ in range(steps // BLOCK_STEPS)]
        store.close()
    watched.check_stage()
    plain.check_stage()
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", nargs="+", choices=HOSTS, default=["cnn", "decoder"])
    parser.add_argument("--samples", type=int, help="in a batch; default as the host has them")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.steps < 2 * BLOCK_STEPS:
        parser.error(f"--steps must be at least {2 * BLOCK_STEPS}, two blocks")
    console = Console(width=100)
    console.print(
        f"eager, {options.device}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"blocks of {BLOCK_STEPS} steps, {options.steps} steps each; esper {esper.__version__}"
    )
    for name in options.host:
        torch.manual_seed(0)
        blocks = blocks_of(smaller(HOSTS[name](options.device), options.samples), options.steps)
        step = 1e3 * statistics.median(block.step for block in blocks)
        console.print(f"\n{name}, {step:.2f} ms a step without")
        console.print(table_of(blocks))


if __name__ == "__main__":
    main()
