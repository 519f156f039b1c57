"""Does growth pay on digits? Three networks, equal steps, equal data, equal tuning.

- host: the host as it is;
- grown: the same host grown by the task's default policy;
- static: the network that the grown run ended with, trained at that size from the first step.

Every arm tries the same learning rates, and takes the one with the lowest mean validation loss over
all seeds; the table shows its loss and accuracy on the test split, which nothing was chosen by.
Finished runs are kept in a JSON file, so an interrupted benchmark goes on where it was.

    python benchmarks/digits_growth.py [--seeds 5] [--first-seed 0] [--jobs 2] [--cache FILE]
"""

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from esper.experiments.config import load_run_config
from esper.experiments.run import prepare

LEARNING_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
ARMS = ("host", "grown", "static")

Topology = list[tuple[str, str]]


@dataclass(frozen=True)
class Result:
    """One finished run."""

    arm: str
    learning_rate: float
    seed: int
    params: int
    validation_loss: float
    test_loss: float
    test_accuracy: float
    committed: Topology


def train(arm: str, learning_rate: float, seed: int, topology: Topology) -> Result:
    """Train one arm once."""
    torch.set_num_threads(1)
    options = {
        "random_seed": seed,
        "learning_rate": learning_rate,
        "policy": "heuristic" if arm == "grown" else "none",
    }
    run = prepare(load_run_config("digits", None, [], options), run_id=arm)
    slots = run.growth.slots
    for path, blueprint in topology:
        slots[path].germinate(blueprint)
        while slots[path].living is not None:
            slots[path].advance(force=True)
    for _ in run.reports:
        pass
    validation, test = run.setup.validation(), run.setup.test()
    committed = [(path, seed.blueprint) for path, slot in slots.items() for seed in slot.committed]
    return Result(
        arm=arm,
        learning_rate=learning_rate,
        seed=seed,
        params=run.param_count(),
        validation_loss=validation["loss"],
        test_loss=test["loss"],
        test_accuracy=test["accuracy"],
        committed=committed,
    )


def run_all(
    jobs: list[tuple[str, float, int, Topology]], cache: Path, workers: int, label: str
) -> list[Result]:
    """Train what is not in the cache yet, several processes at a time."""
    known = {(r.arm, r.learning_rate, r.seed): r for r in load(cache)}
    todo = [job for job in jobs if job[:3] not in known]
    with Progress() as progress, ProcessPoolExecutor(workers) as pool:
        bar = progress.add_task(label, total=len(jobs), completed=len(jobs) - len(todo))
        for future in as_completed([pool.submit(train, *job) for job in todo]):
            result = future.result()
            known[result.arm, result.learning_rate, result.seed] = result
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            progress.advance(bar)
    return [known[job[:3]] for job in jobs]


def load(cache: Path) -> list[Result]:
    """Return the finished runs of an earlier start."""
    if not cache.exists():
        return []
    lines = cache.read_text(encoding="utf-8").splitlines()
    return [Result(**json.loads(line)) for line in lines]


def best_rate(results: list[Result]) -> list[Result]:
    """Return the runs at the learning rate with the lowest mean validation loss."""

    def mean_loss(rate: float) -> float:
        return statistics.mean(r.validation_loss for r in results if r.learning_rate == rate)

    rate = min({result.learning_rate for result in results}, key=mean_loss)
    return [result for result in results if result.learning_rate == rate]


def summarise(console: Console, arms: dict[str, list[Result]]) -> None:
    """Print the table, and every seed's paired difference to the host."""
    table = Table(box=None, header_style="dim")
    for column in ("arm", "learning rate", "params", "test loss", "test accuracy", "beats host"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    host = {result.seed: result for result in arms["host"]}
    for arm, results in arms.items():
        wins = sum(result.test_loss < host[result.seed].test_loss for result in results)
        table.add_row(
            arm,
            f"{results[0].learning_rate:g}",
            f"{statistics.mean(result.params for result in results):,.0f}",
            spread([result.test_loss for result in results]),
            spread([result.test_accuracy for result in results]),
            "" if arm == "host" else f"{wins} of {len(results)}",
        )
    console.print(table)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "esper-digits-growth.jsonl"
    )
    options = parser.parse_args()
    console = Console(width=120)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    arms = {}
    for arm in ("host", "grown"):
        jobs: list[tuple[str, float, int, Topology]] = [
            (arm, rate, seed, []) for rate in LEARNING_RATES for seed in seeds
        ]
        arms[arm] = best_rate(run_all(jobs, options.cache, options.jobs, arm))
    topologies = {result.seed: result.committed for result in arms["grown"]}
    jobs = [("static", rate, seed, topologies[seed]) for rate in LEARNING_RATES for seed in seeds]
    arms["static"] = best_rate(run_all(jobs, options.cache, options.jobs, "static"))
    summarise(console, arms)
    for result in arms["grown"]:
        grown = ", ".join(f"{blueprint} in {path}" for path, blueprint in result.committed)
        console.print(f"seed {result.seed}: {grown or 'nothing committed'}")


if __name__ == "__main__":
    main()
