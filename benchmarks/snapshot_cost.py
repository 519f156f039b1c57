"""What does keeping a run cost? Snapshots of the governor in memory, and checkpoints on disk.

Each bundled task trains in two copies that take turns, 50 steps each: one without snapshots, one
that takes a snapshot at its default interval. Shown are the median step, one snapshot and one
checkpoint in milliseconds, what a snapshot every so many steps is of training by these figures, and
the measured ratio of both copies' times, with its lowest and highest pair of turns.

    python benchmarks/snapshot_cost.py [--steps 1000] [--tasks digits text]
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from esper.experiments import load_run_config, prepare
from esper.training import Checkpoints, Trainer

TURN_STEPS = 50


class Turns:
    """A trainer that is advanced a number of steps at a time; a keeper that counts them."""

    def __init__(self, task: str, snapshot_steps: int | None) -> None:
        governor = {"snapshot_steps": snapshot_steps}
        trainer = {"epochs": 10_000, "governor": governor}
        config = load_run_config(task, None, ["count_flops=false"], {"trainer": trainer})
        self.trainer = prepare(config).trainer
        self.trainer.keeper = self
        self.seconds: list[float] = []
        self._turns = self._run()

    def after_step(self, trainer: Trainer) -> None:
        """Nothing between steps."""

    def after_epoch(self, trainer: Trainer) -> None:
        """Nothing between epochs."""

    def _run(self):
        group = self.trainer._accumulation_groups  # noqa: SLF001 – steps, not epochs, are timed
        while True:
            for batches in group():
                self.trainer.model.train()
                started = time.perf_counter()
                self.trainer._make_step(batches)  # noqa: SLF001
                self.trainer._keep_snapshot()  # noqa: SLF001
                self.seconds.append(time.perf_counter() - started)
                yield

    def turn(self) -> float:
        """Make some steps; return their seconds."""
        before = len(self.seconds)
        for _ in range(TURN_STEPS):
            next(self._turns)
        return sum(self.seconds[before:])


def milliseconds(function) -> float:
    times = []
    for _ in range(9):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tasks", nargs="*", default=["digits", "teacher", "text", "text-large"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(box=None, header_style="dim")
    for column in (
        "task",
        "step",
        "snapshot",
        "checkpoint",
        "every 200 steps",
        "measured",
        "range",
    ):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in options.tasks:
        default = Turns(task, 200)
        without = Turns(task, None)
        default.turn(), without.turn()
        pairs = [
            (default.turn(), without.turn()) if k % 2 else (without.turn(), default.turn())[::-1]
            for k in range(options.steps // TURN_STEPS)
        ]
        # A snapshot falls in every fourth turn.
        fours = [pairs[start : start + 4] for start in range(0, len(pairs) - 3, 4)]
        ratios = [sum(a for a, _ in four) / sum(b for _, b in four) for four in fours]
        step = 1e3 * statistics.median(without.seconds)
        snapshot = milliseconds(default.trainer.state_dict)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder))
            checkpoint = milliseconds(partial(checkpoints.save, default.trainer))
        table.add_row(
            task,
            f"{step:.2f} ms",
            f"{snapshot:.2f} ms",
            f"{checkpoint:.1f} ms",
            f"{snapshot / (200 * step):.2%}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} – {max(ratios):.3f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
