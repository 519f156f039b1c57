"""Do many small hosts train faster in processes of their own, or batched?

Host-epochs per second of the digits task's host, the ways in turn, each repeated. A host-epoch is
20 steps of 50 images with AdamW. It is measured training only, and with an evaluation an epoch, as
a decision needs it. Shown are medians over the repeats, and the range.

- by hand: processes on the CPU, one thread each, train a bare host in a plain loop;
- esper: they train one run after the other that never grows, on the CPU or on the GPU: with the
  slots, the checks and, where it is evaluated, the decision of a worker of reinforcement learning;
- batched: a process trains N hosts as one, by `vmap` over stacked parameters; by hand, and checked
  against the same hosts trained alone.

Hosts can be batched while they run the same operations. How long they do under a policy is measured
too: runs train and grow, and before each epoch those of equal structure are counted together: the
same seeds in the same slots, in the same mode of the forward. From that and from how long a batch
of so many hosts takes follows what batching by structure would yield. It is an upper bound: sizes
between two measured ones are interpolated, processes share the groups evenly, seeds take no time,
and regrouping and all that esper does besides are free.

    python benchmarks/host_parallelism.py [--device cuda] [--hosts 1 4 16 64 256] [--repeats 3]
        [--processes N] [--seconds 1] [--quick]
"""

import argparse
import hashlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console

from esper.compilation.structures import structure_of_slot
from esper.experiments import load_run_config, prepare
from esper.slots.slot_set import SlotSet
from esper.tasks.digits.data import BATCH_IMAGES, TRAIN_IMAGES, load_splits
from esper.tasks.digits.host import DigitsHost
from objective_tables import machine, show
from stacked_hosts import LEARNING_RATE, Alone, Batches, Stacked, largest_difference

RUN_EPOCHS = 40
POLICIES = ("random", "heuristic")
GPU_PROCESSES = 4
START_SECONDS = 200.0
"""For the slowest process to be ready, the first time with a CUDA context to make."""

_starts: dict[int, Any] = {}
"""By number of processes, the barrier behind which they begin together."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How hosts are trained."""

    kind: Literal["by hand", "esper", "batched"]
    device: str
    processes: int
    hosts: int = 1
    """In each process, as one."""
    evaluated: bool = False
    """After each epoch."""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.hosts} hosts" if self.kind == "batched" else self.kind


def epochs_by_hand(way: Way) -> Iterator[int]:
    """Train bare hosts, yielding after each epoch how many have made it."""
    validation = load_splits()[1]
    images, labels = validation.images.to(way.device), validation.labels.to(way.device)
    hosts = [DigitsHost().to(way.device) for _ in range(way.hosts)]
    loop = Stacked(hosts) if way.kind == "batched" else Alone(hosts[0])
    batches = Batches(way.hosts, way.device)
    while True:
        for step in batches.epoch():
            loop.step(*step)
        if way.evaluated:
            loop.evaluate(images, labels)
        yield way.hosts


def epochs_by_esper(way: Way) -> Iterator[int]:
    """Train one run after the other that never grows, yielding after each epoch."""
    decisions = {} if way.evaluated else {"decision_interval_steps": RUN_EPOCHS * steps_per_epoch()}
    for random_seed in itertools.count():
        trainer = {"epochs": RUN_EPOCHS, **decisions}
        options = {**digits_options("none", random_seed), "device": way.device, "trainer": trainer}
        for _ in prepare(load_run_config("digits", None, (), options)).reports:
            yield 1


def digits_options(policy: str, random_seed: int) -> dict[str, Any]:
    return {
        "policy": policy,
        "random_seed": random_seed,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "count_flops": False,
    }


def steps_per_epoch() -> int:
    return TRAIN_IMAGES // BATCH_IMAGES


def set_up_process(starts: Mapping[int, Any]) -> None:
    torch.set_num_threads(1)
    _starts.update(starts)


def rate_in_process(way: Way, seconds: float) -> float:
    """Return one process's host-epochs per second while all of the way's processes train."""
    epochs = epochs_by_esper(way) if way.kind == "esper" else epochs_by_hand(way)
    start = _starts[way.processes]
    try:
        next(epochs)  # the first one is slower
        wait_for(way.device)
    except BaseException:
        start.abort()  # nobody needs to wait any more
        raise
    start.wait()
    started, finished = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        finished += next(epochs)
    wait_for(way.device)
    return finished / (time.perf_counter() - started)


def rate_of(way: Way, seconds: float, pool: ProcessPoolExecutor) -> float:
    """Return the host-epochs per second of all of a way's processes."""
    running = [pool.submit(rate_in_process, way, seconds) for _ in range(way.processes)]
    failures = [error for process in running if (error := process.exception())]
    if failures:
        raise BaseExceptionGroup(f"{way} cannot be measured", failures)
    return sum(process.result() for process in running)


def wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def structures(policy: str, random_seed: int, epochs: int) -> list[str]:
    """Grow a run, and return for each epoch a digest of the structure that it trains with."""
    options = {**digits_options(policy, random_seed), "trainer": {"epochs": epochs}}
    run = prepare(load_run_config("digits", None, (), options))
    found = [structure(run.growth.slots)]
    found += [structure(run.growth.slots) for _ in run.reports]
    return found[:epochs]


def structure(slots: SlotSet) -> str:
    """Return what has to be equal for two hosts to run the same operations."""
    kinds = [
        (path, slot.kind.graph, structure_of_slot(slot))
        for path, slot in slots.items()
        if slot.active  # else its forward does nothing, whether it holds a new seed or none
    ]
    return hashlib.sha256(repr(kinds).encode()).hexdigest()


def group_sizes(courses: Sequence[Sequence[str]], at_once: int) -> list[list[int]]:
    """Return the sizes of the groups of equal structure, for each epoch of so many runs at once."""
    together = [courses[first : first + at_once] for first in range(0, len(courses), at_once)]
    return [list(Counter(epoch).values()) for runs in together for epoch in zip(*runs, strict=True)]


Rates = Mapping[Way, Sequence[float]]
"""Host-epochs per second in each repeat."""


def median_rates(rates: Rates, kind: str) -> dict[Way, float]:
    """Return those of a kind, with an evaluation an epoch."""
    found = {way: repeats for way, repeats in rates.items() if way.kind == kind and way.evaluated}
    return {way: statistics.median(repeats) for way, repeats in found.items()}


def rate_in_batches(groups: Sequence[Sequence[int]], rates: Rates) -> float:
    """Return the host-epochs per second if every group is a batch, in as many processes as pay."""
    curves: dict[int, dict[int, float]] = {}
    for way, rate in median_rates(rates, "batched").items():
        curves.setdefault(way.processes, {})[way.hosts] = way.hosts / rate
    sizes = [size for epoch in groups for size in epoch]
    return max(
        sum(sizes) / sum(seconds_of(size, curve) for size in sizes) for curve in curves.values()
    )


def seconds_of(size: int, curve: Mapping[int, float]) -> float:
    """Return how long a batch takes, from how long others take; past the largest in proportion."""
    for (low, short), (high, long) in itertools.pairwise(sorted(curve.items())):
        if low <= size <= high:
            return short + (long - short) * (size - low) / (high - low)
    return curve[max(curve)] * size / max(curve)


def rates_rows(rates: Rates) -> list[list[str]]:
    def told(way: Way) -> str:
        low, high = min(rates[way]), max(rates[way])
        return f"{statistics.median(rates[way]):,.1f} ({low:,.1f}–{high:,.1f})"

    return [
        [way.name, way.device, str(way.processes), told(way), told(replace(way, evaluated=True))]
        for way in rates
        if not way.evaluated
    ]


def growth_row(policy: str, groups: Sequence[Sequence[int]], rates: Rates) -> list[str]:
    """Return what batching by structure would yield for runs that grow by a policy."""
    at_once = sum(groups[0])
    number = statistics.mean(map(len, groups))
    company = statistics.mean(sum(size**2 for size in epoch) / at_once for epoch in groups)
    singly = (max(median_rates(rates, kind).values()) for kind in ("by hand", "esper"))
    yields = (rate_in_batches(groups, rates), rate_in_batches([[at_once]], rates), *singly)
    counts = (number, at_once / number, company)
    return [policy, str(at_once), *(f"{value:,.1f}" for value in (*counts, *yields))]


def verdict(policy: str, groups: Sequence[Sequence[int]], rates: Rates) -> str:
    """Say what wins for runs that grow by a policy, and from which size on batching would."""
    singly = median_rates(rates, "by hand")
    way = max(singly, key=singly.__getitem__)
    alone, batched = singly[way], rate_in_batches(groups, rates)
    sizes = [way.hosts for way, rate in median_rates(rates, "batched").items() if rate > alone]
    winner = "batching by structure wins" if batched > alone else "one process per host wins"
    pays = f"from groups of {min(sizes)} on" if sizes else "at no size of a group"
    where = f"{way.processes} process{'es' * (way.processes > 1)} on the {way.device}"
    return (
        f"{sum(groups[0])} runs under the {policy} policy: {winner}. Batched they would make "
        f"{batched:,.1f} host-epochs/s at most, by hand in {where} {alone:,.1f}: "
        f"{batched / alone:.2f} to 1. Of the sizes measured, batching is faster {pays}."
    )


def ways_of(device: str, processes: int, hosts: Sequence[int]) -> Iterator[Way]:
    """Yield every way."""
    few = sorted({1, processes})
    in_batches = [processes] if device == "cpu" else sorted({1, min(GPU_PROCESSES, processes)})
    for evaluated in (False, True):
        for count in few:
            yield Way(kind="by hand", device="cpu", processes=count, evaluated=evaluated)
        for where in {"cpu": None, device: None}:
            for count in few if where == "cpu" else sorted({*few, *in_batches}):
                yield Way(kind="esper", device=where, processes=count, evaluated=evaluated)
        for count, size in itertools.product(in_batches, hosts):
            yield Way(
                kind="batched", device=device, processes=count, hosts=size, evaluated=evaluated
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, at least")
    parser.add_argument("--quick", action="store_true", help="too short to measure anything")
    options = parser.parse_args()
    hosts, at_once, epochs = sorted({1, *options.hosts}), (16, 64), RUN_EPOCHS
    if options.quick:
        hosts, at_once, epochs = [1, 2], (2, 4), 2
        options.repeats, options.seconds, options.processes = 1, 0.001, 2
    processes, device = options.processes, options.device
    console = Console(width=100)
    console.print(
        f"digits, {steps_per_epoch()} steps of {BATCH_IMAGES} images a host-epoch, {processes} "
        f"cores used, {machine()}"
    )
    context = multiprocessing.get_context("spawn")
    ways = list(ways_of(device, processes, hosts))
    starts = {way.processes: context.Barrier(way.processes, timeout=START_SECONDS) for way in ways}
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=set_up_process, initargs=(starts,)
    ) as pool:
        difference = pool.submit(largest_difference, device).result()
        console.print(f"batched and alone differ by {difference:.1e} at most after an epoch")
        rates: dict[Way, list[float]] = {way: [] for way in ways}
        for _, way in itertools.product(range(options.repeats), ways):
            rates[way].append(rate_of(way, options.seconds, pool))
        header = ["host-epochs/s", "device", "processes", "training", "with an evaluation an epoch"]
        show(console, header, rates_rows(rates), markdown=True)
        growing = {
            policy: [pool.submit(structures, policy, seed, epochs) for seed in range(max(at_once))]
            for policy in POLICIES
        }
        courses = {policy: [run.result() for run in runs] for policy, runs in growing.items()}
    grouped = [
        (policy, group_sizes(runs, count)) for policy, runs in courses.items() for count in at_once
    ]
    header = ["policy", "runs at once", "structures", "runs a structure", "a run's group"]
    header += ["batched by structure", "were all equal", "by hand", "esper"]
    console.print()
    show(console, header, [growth_row(*each, rates) for each in grouped], markdown=True)
    for each in grouped:
        console.print(f"\n{verdict(*each, rates)}")


if __name__ == "__main__":
    main()
