"""Do the gates refuse what is useless, and does growth find what is missing?

- useless seeds (`planted_seeds.py`) and a useful one are planted in every free slot of a host,
  again and again, whatever they were refused for; counted are the runs in which one was committed;
- the teacher task grows by its own settings; counted are the runs in which the missing block was
  committed at its slot, and seeds committed anywhere else.

One process, one thread. Finished runs are kept in a JSON-lines file, so an interrupted benchmark
goes on where it was.

    python benchmarks/useless_seeds.py [--runs 20] [--cache FILE] [--only teacher|planted]
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from esper.experiments import load_run_config, prepare
from esper.lifecycle.actions import Action, Germinate, GrowthState, Operation, legal_operations
from esper.lifecycle.events import (
    EventRecord,
    GateEvaluated,
    SeedCommitted,
    SeedGerminated,
    SeedPruned,
)
from esper.lifecycle.gates import GateThresholds
from esper.policies import tend
from esper.tasks.teacher.task import missing_slot, teacher_loss
from esper.training.safeguard import TrainingDivergedError
from planted_seeds import USELESS, planted
from tiny_decoder import decoder_setup

EPOCHS = 16
FIRST_EPOCH = 2
USEFUL_RUNS = 5
USEFUL = {"digits": "conv_heavy", "teacher": "mlp", "decoder": "block"}
LIVE_EPOCHS = 12
"""A live seed is committed or refused sooner."""
CELLS = (
    ("digits, own gates", "none", USELESS),
    ("digits, own gates", "shadowing", USELESS),
    ("digits", "shadowing", ("random_output",)),
    ("digits", "none", USELESS),
    ("teacher", "shadowing", USELESS),
    ("teacher", "none", USELESS),
    ("decoder", "none", USELESS),
)
"""Task, isolation, and what is planted. Gates are the default ones but where a task has its own."""

DEFAULT_GATES = [
    f"slot.thresholds.{name}={'none' if value is None else value}"
    for name, value in GateThresholds().model_dump().items()
]

Row = dict[str, Any]


class Planter:
    """Plants one blueprint in every free slot, and tends it as the heuristic does.

    Args:
        blueprint: What to plant.
        but_in: A slot that is left alone.
    """

    name = "planter"

    def __init__(self, blueprint: str, *, but_in: str | None = None) -> None:
        self._blueprint = blueprint
        self._but_in = but_in

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return advances, prunes and commits, then a germination for each free slot."""
        actions = [
            action
            for slot in state.slots
            for action in tend(slot, patience_epochs=6, fade_steps=20)
        ]
        if state.epoch < FIRST_EPOCH:
            return actions
        free = [
            slot
            for slot in state.slots
            if Operation.GERMINATE in legal_operations(slot) and slot.path != self._but_in
        ]
        return actions + [Germinate(slot=slot.path, blueprint=self._blueprint) for slot in free]


class Tally:
    """A sink that counts seeds, commits, and the gate that each pruned seed did not pass."""

    def __init__(self) -> None:
        self.seeds = 0
        self.committed: list[tuple[str, str, int]] = []
        self.refused: Counter[str] = Counter()
        self._last_gate: dict[str, str] = {}

    def publish(self, record: EventRecord) -> None:
        """Count one event."""
        event = record.event
        if isinstance(event, SeedGerminated):
            self.seeds += 1
        elif isinstance(event, GateEvaluated):
            self._last_gate[event.slot] = event.result.gate.value
        elif isinstance(event, SeedCommitted):
            self.committed.append((event.slot, event.blueprint, record.epoch))
        elif isinstance(event, SeedPruned):
            self.refused[self._last_gate.get(event.slot, "none")] += 1

    def measure(self, epoch: int, step: int, metrics: object) -> None:
        """Metrics are not counted."""

    def flush(self) -> None:
        """Nothing is written."""


def run_planted(
    task: str, isolation: str, kind: str, seed: int, settings: Sequence[str] = ()
) -> Row:
    """Train one host with one kind of seed planted in it.

    Args:
        task: digits, teacher, decoder; or digits with its own gates.
        isolation: Of every slot.
        kind: A blueprint, or useful.
        seed: Fixes everything.
        settings: As `esper grow --set` takes them.

    Effects: seeds the default random stream, which planted seeds draw from.
    """
    torch.manual_seed(seed)
    name = task.partition(",")[0]
    blueprint = USEFUL[name] if kind == "useful" else kind
    decoder = name == "decoder"
    all_settings = [
        *(DEFAULT_GATES if name == task else ()),
        f"slot.isolation={isolation}",
        f"trainer.epochs={LIVE_EPOCHS if isolation == 'none' else EPOCHS}",
        "trainer.isolation_check_steps=none",  # not what is measured here
        *settings,
    ]
    config = load_run_config(
        "teacher" if decoder else name, None, all_settings, {"random_seed": seed}
    )
    tally = Tally()
    setup = decoder_setup(seed) if decoder else None
    run = prepare(config, sinks=[tally], setup=setup)
    # Where something is missing, random features that are not linear are of real use.
    is_of_use = task == "teacher" and kind == "random_output"
    run.growth.policy = Planter(blueprint, but_in=missing_slot(seed) if is_of_use else None)
    diverged = False
    try:
        for _ in run.reports:
            pass
    except (
        TrainingDivergedError
    ):  # the policy plants what harms again wherever the run goes back to
        diverged = True
    return {
        "diverged": diverged,
        "seeds": tally.seeds,
        "committed": tally.committed,
        "refused": dict(tally.refused),
        "loss": run.setup.test()["loss"],
    }


def run_teacher(seed: int) -> Row:
    """Grow one student by the task's own settings."""
    tally = Tally()
    run = prepare(load_run_config("teacher", None, [], {"random_seed": seed}), sinks=[tally])
    before = run.setup.test()["loss"]
    for _ in run.reports:
        pass
    control = prepare(
        load_run_config("teacher", None, [], {"random_seed": seed, "policy": "none"}),
    )
    for _ in control.reports:
        pass
    return {
        "missing": missing_slot(seed),
        "committed": tally.committed,
        "before": before,
        "alone": control.setup.test()["loss"],
        "grown": run.setup.test()["loss"],
        "floor": teacher_loss(seed),
    }


def jobs_of(runs: int, only: str | None) -> Iterator[tuple[str, str, str, int]]:
    """Yield every run as (task, isolation, kind, seed)."""
    # One random seed after the other: an interrupted benchmark has some of everything.
    for seed in range(runs):
        if only != "planted":
            yield "teacher", "own", "grown", seed
            yield "teacher", "own", "grown", runs + seed
        if only != "teacher":
            for task, isolation, kinds in CELLS:
                for kind in ("useful", *kinds) if seed < USEFUL_RUNS else kinds:
                    yield task, isolation, kind, seed


def run_all(jobs: Sequence[tuple[str, str, str, int]], cache: Path) -> list[Row]:
    """Run what is not in the cache yet."""
    done: dict[tuple[Any, ...], Row] = {}
    if cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            done[tuple(row["job"])] = row
    with Progress() as progress, cache.open("a", encoding="utf-8") as file, planted():
        bar = progress.add_task("runs", total=len(jobs), completed=sum(job in done for job in jobs))
        for job in jobs:
            if job in done:
                continue
            task, isolation, kind, seed = job
            started = time.process_time()
            row = run_teacher(seed) if kind == "grown" else run_planted(task, isolation, kind, seed)
            row |= {"job": job, "cpu_seconds": round(time.process_time() - started, 2)}
            done[job] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(bar)
    return [done[job] for job in jobs]


def planted_table(rows: Sequence[Row]) -> Table:
    """Return one line per kind, task and isolation."""
    table = Table(box=None, header_style="dim")
    for column in ("seed", "task", "isolation", "runs", "with a commit", "seeds", "refused at"):
        table.add_column(column)
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        task, isolation, kind, _ = row["job"]
        cells.setdefault((kind, task, isolation), []).append(row)
    for (kind, task, isolation), found in sorted(cells.items(), key=lambda item: item[0][0]):
        refused = sum((Counter(row["refused"]) for row in found), Counter())
        table.add_row(
            f"useful: {USEFUL[task.partition(',')[0]]}" if kind == "useful" else kind,
            task,
            isolation,
            str(len(found)),
            str(sum(bool(row["committed"]) for row in found)),
            str(sum(row["seeds"] for row in found)),
            ", ".join(f"{gate} {count}" for gate, count in sorted(refused.items())),
        )
    return table


def teacher_table(rows: Sequence[Row], runs: int) -> Table:
    """Return one line per block of random seeds."""
    table = Table(box=None, header_style="dim")
    columns = ("seeds", "at the right slot", "seeds elsewhere", "nothing", "test loss at first")
    for column in (*columns, "host alone", "grown", "the teacher's own"):
        table.add_column(column, justify="right")

    def mean(found: Sequence[Row], key: str) -> str:
        return f"{sum(row[key] for row in found) / len(found):.4f}"

    for first in range(0, len(rows), runs):
        found = rows[first : first + runs]
        right = sum(any(c[0] == row["missing"] for c in row["committed"]) for row in found)
        wrong = sum(sum(c[0] != row["missing"] for c in row["committed"]) for row in found)
        nothing = sum(not row["committed"] for row in found)
        table.add_row(
            f"{first} to {first + len(found) - 1}",
            f"{right} of {len(found)}",
            str(wrong),
            str(nothing),
            *(mean(found, key) for key in ("before", "alone", "grown", "floor")),
        )
    return table


def main() -> None:
    """Run what is missing and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", choices=("teacher", "planted"))
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "esper-useless-seeds.jsonl"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = run_all(list(jobs_of(options.runs, options.only)), options.cache)
    console = Console(width=120)
    taught = sorted(
        (row for row in rows if row["job"][2] == "grown"), key=lambda row: row["job"][3]
    )
    if taught:
        console.print(teacher_table(taught, options.runs))
    others = [row for row in rows if row["job"][2] != "grown"]
    if others:
        console.print(planted_table(others))
    seconds = sum(row["cpu_seconds"] for row in rows)
    console.print(f"{len(rows)} jobs, {seconds / 60:.0f} minutes of one core")


if __name__ == "__main__":
    main()
