"""When should a decoder grow, and how? Runs at a learning rate that never falls, side by side.

Each arm trains the text task's host on the same windows in the same order, at a constant learning
rate after the warm-up, so that one run tells of every length. `static` has six layers from the
start, `host` keeps its two, the others go from two to six at a share of the run: by the default
policy, or changed in one thing. Shown for each arm, means over the random seeds:

- FLOPs: of training, as a share of static's in as many steps;
- loss: training loss of the last tenth of the run less static's, with the range over the seeds;
- as static after: the step at which static's loss was that of the arm in the end;
- to match: the arm's FLOPs over those of static up to that step. Below 1 growing has paid.

The learning rate does not fall here, so these are no final losses: `esper compare text` makes
those. Finished runs are kept in a JSON-lines file, so that an interrupted benchmark goes on where
it was.

    python benchmarks/growth_timing.py [--seeds 2] [--epochs 56] [--cache FILE] [--picture FILE]
        [--markdown] [--processes 2]
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from esper.experiments import load_run_config, prepare
from esper.report import new_figure
from kept_runs import make_missing
from objective_tables import machine, show

HOST, STATIC = "host", "static"
GROWN: Mapping[str, Mapping[str, Any]] = {
    "at 6 %": {"fractions": (0.0625,)},
    "at 12 %": {"fractions": (0.125,)},
    "at 25 %": {"fractions": (0.25,)},
    "at 38 %": {"fractions": (0.375,)},
    "at 50 %": {"fractions": (0.5,)},
    "at 12 and 38 %": {"fractions": (0.125, 0.375)},
    "at 25 %, behind the last layer": {"fractions": (0.25,), "slots": ("blocks.1",)},
    "at 25 %, copies": {"fractions": (0.25,), "options": {"source": "own"}},
    "at 25 %, copies with optimizer state": {
        "fractions": (0.25,),
        "options": {"source": "own"},
        "copy_optimizer_state": True,
    },
}
ARMS = (HOST, STATIC, *GROWN)


@dataclass(frozen=True)
class Result:
    """One finished run, with its course by epoch."""

    arm: str
    seed: int
    epochs: int
    epoch_steps: int
    losses: list[float]
    """Mean training loss of each epoch."""
    flops: list[float]
    """Of training, up to the end of each epoch."""
    num_committed: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.arm, self.seed, self.epochs

    @property
    def final_loss(self) -> float:
        """Over the last tenth of the run."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


def make(arm: str, seed: int, epochs: int) -> Result:
    """Train one arm."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {
        "policy": "schedule" if arm in GROWN else "none",
        "random_seed": seed,
        "schedule": "constant",
        "trainer": {"epochs": epochs},
        "growth_schedule": dict(GROWN.get(arm, {})),
    }
    run = prepare(load_run_config("text", None, (), options))
    if arm == STATIC:
        for slot in run.growth.slots.values():
            slot.germinate("block", depth=2)
            while slot.living is not None:
                slot.advance(force=True)
    reports = list(run.reports)
    return Result(
        arm=arm,
        seed=seed,
        epochs=epochs,
        epoch_steps=reports[0].step,
        losses=[report.train_loss for report in reports],
        flops=[float(report.cost.training.flops or 0) for report in reports],
        num_committed=sum(len(slot.committed) for slot in run.growth.slots.values()),
    )


def smooth(result: Result) -> list[tuple[float, float]]:
    """Return steps with the mean loss of five epochs around each."""
    windows = (result.losses[start : start + 5] for start in range(len(result.losses) - 4))
    return [
        ((start + 2.5) * result.epoch_steps, statistics.fmean(window))
        for start, window in enumerate(windows)
    ]


def step_of(static: Result, loss: float) -> float | None:
    """Return the step from which static's loss is no higher; None if it never is."""
    points = smooth(static)
    for (before, high), (after, low) in itertools.pairwise(points):
        if high >= loss > low:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def row(arm: str, results: Sequence[Result], static: Mapping[int, Result]) -> list[str]:
    """Return one arm's line of the table."""
    own = [result for result in results if result.arm == arm]
    share = statistics.fmean(run.flops[-1] / static[run.seed].flops[-1] for run in own)
    gaps = [run.final_loss - static[run.seed].final_loss for run in own]
    told = f"{statistics.fmean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"
    last = own[0].epoch_steps * own[0].epochs
    steps = [step_of(static[run.seed], run.final_loss) for run in own]
    reached = [step for step in steps if step is not None]
    if len(reached) == len(own):
        # A loss of the last tenth belongs to the middle of it.
        middle = last - own[0].epoch_steps * max(1, own[0].epochs // 10) / 2
        worth = statistics.fmean(reached)
        after, match = f"{worth:,.0f}", f"{share * middle / worth:.2f}"
    else:
        after, match = f"> {smooth(own[0])[-1][0]:,.0f}", f"< {share:.2f}"
    committed = "" if arm in (HOST, STATIC) else str(sum(run.num_committed for run in own))
    return [arm, f"{share:.2f}", told, after, match, committed]


def draw(results: Sequence[Result], target: Path) -> None:
    """Write a PNG: loss less static's over steps, for each time of growing."""
    static = {run.seed: dict(smooth(run)) for run in results if run.arm == STATIC}
    figure = new_figure(9.0, 4.6)
    axis = figure.subplots()
    shades = {"host": "#8a97a3", "at 6 %": "#b7dfc5", "at 12 %": "#7fc79a", "at 25 %": "#2e8b57",
              "at 38 %": "#e8a13b", "at 50 %": "#b3261e"}  # fmt: skip
    for arm, colour in shades.items():
        own = [dict(smooth(run)) for run in results if run.arm == arm]
        seeds = [run.seed for run in results if run.arm == arm]
        if not own:
            continue
        steps = list(own[0])
        gaps = [
            statistics.fmean(
                course[step] - static[seed][step] for seed, course in zip(seeds, own, strict=True)
            )
            for step in steps
        ]
        axis.plot(steps, gaps, color=colour, linewidth=1.8, label=arm)
    axis.axhline(0.0, color="#22303c", linewidth=0.8)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss, less static's (nats per byte)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(target, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=56)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--picture", type=Path)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "esper-growth-timing.jsonl"
    )
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    arms = [arm for arm in ARMS if arm == STATIC or arm in options.arms]
    jobs = [(arm, seed, options.epochs) for seed in seeds for arm in arms]
    results = make_missing(make, Result, jobs, cache=options.cache, processes=options.processes)
    static = {run.seed: run for run in results if run.arm == STATIC}
    console = Console(width=132)
    console.print(f"{len(results)} runs, {machine()}")
    columns = ["arm", "FLOPs", "loss, less static's", "as static after", "to match", "committed"]
    rows = [row(arm, results, static) for arm in arms]
    show(console, columns, rows, markdown=options.markdown)
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
