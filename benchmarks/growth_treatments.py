"""How should a decoder be grown? One thing changed at a time, each run to the end of its schedule.

The text task grows from two layers to six at a quarter of the run: blocks by the policy's defaults,
or with one thing changed: learning rates, how new layers begin, where they lie, what grows instead
of layers, in how many events. Every arm sees the same windows in the
same order and trains until its learning rate has fallen to 0. Shown for each arm, means over its
random seeds with half of their 95 % interval:

- seeds: how many random seeds it was run on, where those that looked worst have one;
- FLOPs: of training, as a share of static's, which has six layers from the start;
- test loss;
- less static's, and less that of blocks by the defaults;
- to match: its FLOPs over those with which six layers from the start, in a shorter or longer run of
  their own, reach its loss. Below 1 growing has paid beside them.

An arm named "static, …" has from the start what the arm of that name grows. Finished runs are kept
in a JSON-lines file, so that an interrupted benchmark goes on where it was.

    python benchmarks/growth_treatments.py [--seeds 3] [--epochs 56] [--cache FILE] [--arms A …]
        [--markdown] [--processes 2]
"""

import argparse
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from esper.experiments import load_run_config, prepare
from esper.experiments.comparison.intervals import mean_interval
from esper.experiments.comparison.words import spread
from esper.experiments.run import GrowingRun
from esper.seeds.attention import SelfAttention
from esper.seeds.registry import Family, blueprints
from esper.seeds.seed import Seed
from esper.seeds.stacked import StackedSeed
from esper.seeds.transformer import MLPSeed, TransformerBlockSeed
from esper.tasks.text.host import DecoderBlock
from kept_runs import make_missing
from objective_tables import machine, show

HOST, STATIC, BLOCKS = "host", "static", "blocks"
SHARE = 0.25
"""Of the run, when all but some arms grow."""
NUM_HEADS = 4
SHORTER_AND_LONGER = (0.8, 1.1)
"""Shares of the run in which static is trained besides: its curve of loss over operations."""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What an arm changes.

    Attributes:
        policy: By which it grows.
        schedule: Settings of growth in depth.
        slot: Settings of the slots.
        rate: Factor of the learning rate by the elapsed share of the run; None is 1.
    """

    policy: str = "schedule"
    schedule: Mapping[str, Any] = field(default_factory=dict)
    slot: Mapping[str, Any] = field(default_factory=dict)
    rate: Callable[[float], float] | None = None


def _until_growth(factor: float, share: float) -> float:
    return factor if share < SHARE else 1.0


def _from_growth(factor: float, share: float) -> float:
    return 1.0 if share < SHARE else factor


def _risen_again(length: float, share: float) -> float:
    """Return a learning rate that begins at 0 again when the network has grown."""
    return 1.0 if share < SHARE else min(1.0, (share - SHARE) / length)


@blueprints.register("block_as_host", family=Family.TRANSFORMER)
def _block_as_host(dim: int, *, depth: int = 1) -> Seed:
    """Blocks whose reading weights are drawn as those of the text task's host."""
    return StackedSeed([_block(dim, std=dim**-0.5) for _ in range(depth)])


@blueprints.register("block_large", family=Family.TRANSFORMER)
def _block_large(dim: int, *, depth: int = 1) -> Seed:
    """Blocks whose reading weights are twice as large as those of the text task's host."""
    return StackedSeed([_block(dim, std=2.0 * dim**-0.5) for _ in range(depth)])


@blueprints.register("block_small", family=Family.TRANSFORMER)
def _block_small(dim: int, *, depth: int = 1) -> Seed:
    """Blocks whose reading weights have GPT-2's standard deviation, whatever their width."""
    return StackedSeed([_block(dim, std=0.02) for _ in range(depth)])


@blueprints.register("block_of_readers", family=Family.TRANSFORMER)
def _block_of_readers(dim: int, *, source: nn.Module | None = None, depth: int = 1) -> Seed:
    """Blocks that read as the one in front does; what they write is zero at birth."""
    stack = [_block(dim, std=None) for _ in range(depth)]
    if isinstance(source, DecoderBlock):
        for block in stack:
            for new, old in (
                (block.attention_norm, source.attention_norm),
                (block.attention.project_in, source.project),
                (block.mlp_norm, source.mlp_norm),
                (block.expand, source.expand),
            ):
                new.load_state_dict(old.state_dict())
    return StackedSeed(stack)


@blueprints.register("mlp_as_host", family=Family.TRANSFORMER)
def _mlp_as_host(dim: int, *, expansion: int = 4) -> Seed:
    """A perceptron whose reading weights are drawn as those of the text task's host."""
    seed = MLPSeed(dim, expansion * dim, checkpointing=False)
    _draw(seed.expand, dim**-0.5)
    return seed


def _block(dim: int, std: float | None) -> TransformerBlockSeed:
    attention = SelfAttention(dim, NUM_HEADS, causal=True)
    block = TransformerBlockSeed(dim, 4 * dim, attention, checkpointing=False)
    if std is not None:
        for reader in (block.attention.project_in, block.expand):
            _draw(reader, std)
    return block


def _draw(reader: nn.Linear, std: float) -> None:
    nn.init.normal_(reader.weight, std=std)
    nn.init.zeros_(reader.bias)


TREATMENTS: Mapping[str, Treatment] = {
    BLOCKS: Treatment(),
    "new layers at 2 × the rate": Treatment(slot={"learning_rate_multiplier": 2.0}),
    "new layers at half the rate": Treatment(slot={"learning_rate_multiplier": 0.5}),
    "new layers' rate rises over 100 steps": Treatment(slot={"warmup_steps": 100}),
    "all rates rise again over 2 % of the run": Treatment(rate=partial(_risen_again, 0.02)),
    "1.5 × the rate before": Treatment(rate=partial(_until_growth, 1.5)),
    "1.5 × the rate after": Treatment(rate=partial(_from_growth, 1.5)),
    "drawn as the host's": Treatment(schedule={"blueprint": "block_as_host"}),
    "drawn twice as large": Treatment(schedule={"blueprint": "block_large"}),
    "drawn small": Treatment(schedule={"blueprint": "block_small"}),
    "reads as the layer in front": Treatment(
        schedule={"blueprint": "block_of_readers", "options": {"source": "own"}}
    ),
    "behind the first layer": Treatment(schedule={"slots": ("blocks.0",)}),
    "two events, 6 and 19 %": Treatment(schedule={"fractions": (0.0625, 0.1875)}),
    "perceptrons, 12 × the width": Treatment(
        schedule={"blueprint": "mlp", "factor": 2, "options": {"expansion": 12}}
    ),
    "perceptrons, drawn as the host's": Treatment(
        schedule={"blueprint": "mlp_as_host", "factor": 2, "options": {"expansion": 12}}
    ),
}
STATICS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    STATIC: ("block", {"depth": 2}),
    "static, drawn as the host's": ("block_as_host", {"depth": 2}),
    "static, drawn twice as large": ("block_large", {"depth": 2}),
    "static, perceptrons, 12 × the width": ("mlp", {"expansion": 12}),
    "static, perceptrons, drawn as the host's": ("mlp_as_host", {"expansion": 12}),
}
ARMS = (HOST, *STATICS, *TREATMENTS)
AGAIN = (
    STATIC,
    BLOCKS,
    "drawn as the host's",
    "static, drawn as the host's",
    "perceptrons, 12 × the width",
    "static, perceptrons, 12 × the width",
)
"""Arms that looked best on the first random seed, and what they are held against."""


@dataclass(frozen=True)
class Result:
    """One finished run."""

    arm: str
    seed: int
    epochs: int
    loss: float
    """Of the test split, in nats per byte, of what was committed."""
    flops: float
    """Of training."""
    num_committed: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.arm, self.seed, self.epochs


def make(arm: str, seed: int, epochs: int) -> Result:
    """Train one arm."""
    torch.set_num_threads(1)
    treatment = TREATMENTS.get(arm, Treatment(policy="none"))
    settings: dict[str, Any] = {
        "policy": treatment.policy,
        "random_seed": seed,
        "trainer": {"epochs": epochs},
        "slot": dict(treatment.slot),
        "growth_schedule": {"fractions": (SHARE,), **treatment.schedule},
    }
    run = prepare(load_run_config("text", None, (), settings))
    if arm in STATICS:
        blueprint, options = STATICS[arm]
        for slot in run.growth.slots.values():
            slot.germinate(blueprint, **options)
            while slot.living is not None:
                slot.advance(force=True)
    if treatment.rate is not None:
        _treat_rates(run, treatment.rate)
    *_, last = run.reports
    return Result(
        arm=arm,
        seed=seed,
        epochs=epochs,
        loss=run.judged(run.setup.test)["loss"],
        flops=float(last.cost.training.flops or 0),
        num_committed=sum(len(slot.committed) for slot in run.growth.slots.values()),
    )


def _treat_rates(run: GrowingRun, factor: Callable[[float], float]) -> None:
    """Multiply the learning rate, of host and new layers."""
    scheduler = run.trainer._scheduler  # noqa: SLF001 - nothing else changes a run's schedule
    assert isinstance(scheduler, LambdaLR)
    scheduled = scheduler.lr_lambdas[0]

    def treated(step: int) -> float:
        return scheduled(step) * factor(step / run.total_steps)

    scheduler.lr_lambdas[:] = [treated] * len(scheduler.lr_lambdas)


def flops_to_match(loss: float, curve: Sequence[Result]) -> float | None:
    """Return static's operations at a loss, between two of its runs; None outside of them."""
    for cheap, dear in itertools.pairwise(curve):
        if cheap.loss >= loss >= dear.loss:
            share = (cheap.loss - loss) / (cheap.loss - dear.loss)
            return math.exp((1.0 - share) * math.log(cheap.flops) + share * math.log(dear.flops))
    return None


def row(arm: str, runs: Sequence[Result], epochs: int) -> list[str]:
    """Return one arm's line of the table."""
    by_arm: dict[str, dict[int, Result]] = {}
    curves: dict[int, list[Result]] = {}
    for run in runs:
        if run.arm == STATIC:
            curves.setdefault(run.seed, []).append(run)
        if run.epochs == epochs:
            by_arm.setdefault(run.arm, {})[run.seed] = run
    own, static, blocks = by_arm[arm], by_arm[STATIC], by_arm.get(BLOCKS, {})
    share = statistics.fmean(run.flops / static[seed].flops for seed, run in own.items())
    matches = [
        flops_to_match(run.loss, sorted(curves[seed], key=lambda run: run.flops))
        for seed, run in own.items()
    ]
    shares = [run.flops / match for run, match in zip(own.values(), matches, strict=True) if match]
    told = spread(mean_interval(shares)) if len(shares) == len(own) else "outside"

    def less(others: Mapping[int, Result]) -> str:
        if not others or others is own:
            return ""
        gaps = [run.loss - others[seed].loss for seed, run in own.items()]
        return spread(mean_interval(gaps), signed=True)

    grown = sum(run.num_committed for run in own.values()) if arm in TREATMENTS else ""
    loss = spread(mean_interval([run.loss for run in own.values()]))
    return [
        arm,
        str(len(own)),
        f"{share:.3f}",
        loss,
        less(static),
        less(blocks),
        told,
        str(grown),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=56)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "esper-growth-treatments.jsonl"
    )
    options = parser.parse_args()
    epochs = options.epochs
    arms = [arm for arm in ARMS if arm == STATIC or arm in options.arms]
    jobs = [
        job
        for seed in range(options.seeds)
        for job in (
            *((STATIC, seed, round(share * epochs)) for share in SHORTER_AND_LONGER),
            *((arm, seed, epochs) for arm in arms if seed == 0 or arm in AGAIN),
        )
    ]
    results = make_missing(make, Result, jobs, cache=options.cache, processes=options.processes)
    console = Console(width=140)
    console.print(f"{len(results)} runs, {machine()}")
    columns = [
        "arm",
        "seeds",
        "FLOPs",
        "test loss",
        "less static's",
        "less blocks'",
        "to match",
        "kept",
    ]
    rows = [row(arm, results, epochs) for arm in arms]
    show(console, columns, rows, markdown=options.markdown)


if __name__ == "__main__":
    main()
