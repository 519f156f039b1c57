"""What does the isolation monitor cost? Steps with it on against steps with it off.

Two copies of one host, each with a seed in its first slot, step in turn in one process after a
warm-up; one of them is checked. Shown are

- step: the median step without a check;
- check: the median of a step with a check less that of one without, in milliseconds and in steps;
- every 200 steps: the share of training time that one check per default interval takes;
- measured: all time with the monitor on over all time with it off, at the default interval, over
  whole intervals, and the lowest and highest of them; on a busy machine this says less than the
  two before;
- not due: what the call costs in a step without a check, in microseconds.

    python benchmarks/isolation_monitor.py [--intervals 2] [--device cpu]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import esper
from esper.slots import IsolationMonitor
from esper.slots.isolation_monitor import DEFAULT_INTERVAL_STEPS
from slot_overhead import STAGES, slotted
from speed_hosts import CHANNELS, CNNBlock, SpeedHost, cnn

CHECKS = 15
WARM_UP_STEPS = 5
CALLS = 20_000


def larger(device: str) -> SpeedHost:
    """Return the CNN with two more blocks behind the second slot."""
    host = cnn(device)
    host.model.block2 = nn.Sequential(host.model.block2, CNNBlock(), CNNBlock()).to(device)
    return host


class Side:
    """One network with its optimizer and its monitor."""

    def __init__(self, host: SpeedHost, kind: str) -> None:
        self.host = host
        self.model, self.slots = slotted(host, STAGES[kind])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.slots.bind(self.optimizer)
        self.monitor = IsolationMonitor(self.slots, interval_steps=None)
        self.steps = 0

    def loss(self) -> Tensor:
        return self.host.loss(self.model(self.host.inputs), self.host.labels)

    def step(self) -> None:
        self.monitor.check(self.loss, step=self.steps)
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()
        self.steps += 1
        if self.host.inputs.is_cuda:
            torch.cuda.synchronize()


def seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(first: Side, second: Side, steps: int) -> tuple[list[float], list[float]]:
    """Return both sides' seconds per step."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(steps):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            times[which].append(seconds((first, second)[which].step))
    return times


def call_seconds(side: Side) -> float:
    """Return what asking for a check costs when none is due."""
    side.monitor.interval_steps = 10**9

    def calls() -> None:
        for _ in range(CALLS):
            side.monitor.check(side.loss, step=side.steps)

    return seconds(calls) / CALLS


def row(name: str, kind: str, host: SpeedHost, options: argparse.Namespace) -> list[str]:
    """Measure one host and stage."""
    on, off = (Side(host, kind) for _ in range(2))
    in_turn(on, off, WARM_UP_STEPS)
    on.monitor.interval_steps = 1
    checked, plain = in_turn(on, off, CHECKS)
    step, check = statistics.median(plain), statistics.median(checked) - statistics.median(plain)
    on.monitor.interval_steps = DEFAULT_INTERVAL_STEPS
    ratios, totals = [], [0.0, 0.0]
    for _ in range(options.intervals):
        mine, other = in_turn(on, off, DEFAULT_INTERVAL_STEPS)
        ratios.append(sum(mine) / sum(other))
        totals = [totals[0] + sum(mine), totals[1] + sum(other)]
    spread = f"{min(ratios):.3f} – {max(ratios):.3f}"
    (reading,) = on.monitor.read()
    assert reading.violations == reading.without_verdict == 0
    assert CHECKS + options.intervals - 1 <= reading.checks <= CHECKS + options.intervals + 1
    return [
        f"{name}, {kind}",
        f"{1e3 * step:.2f}",
        f"{1e3 * check:.2f}",
        f"{check / step:.2f}",
        f"{check / step / DEFAULT_INTERVAL_STEPS:.2%}",
        f"{totals[0] / totals[1]:.3f}",
        spread,
        f"{1e6 * call_seconds(on):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--intervals", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    table = Table(box=None, header_style="dim")
    table.add_column("host, stage")
    every = f"every {DEFAULT_INTERVAL_STEPS} steps"
    for column in (
        "step ms", "check ms", "in steps", every, "measured", "lowest – highest", "not due µs"
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for name, build in (("small", cnn), ("larger", larger)):
        host = build(options.device)
        for kind in ("training", "blended"):
            table.add_row(*row(name, kind, host, options))
    console = Console(width=110)
    console.print(
        f"eager, {options.device}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{CHECKS} checks, {options.intervals} intervals of {DEFAULT_INTERVAL_STEPS} steps each; "
        f"esper {esper.__version__}, {CHANNELS} channels"
    )
    console.print(table)


if __name__ == "__main__":
    main()
