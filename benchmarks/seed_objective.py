"""What should a seed minimise behind the host? Every objective over hosts, optimizers and seeds.

Each run trains a host, the learning rate falling to 0 over the last 200 steps. A seed is germinated
at step 400 (decoder: 200), 600 steps before the end, and walks its life through the library's own
gates, which are asked every 25 steps: lax ones, the text task's for the decoder, or others by name.
Gate G2, the line search on held-out data, lets nothing through before 150 steps behind the host,
and asks a tenth of the text task's gain of the decoder. A seed that a gate refuses for 250 steps is
pruned, and the host goes on alone. Arms are `none` (no seed), the objectives, and
`live` (isolation none: at alpha 1 at once);
`proximal:0.3` is proximal with c = 0.3. Shown for each host, optimizer and arm, over the seeds:

- ‖u‖/‖h‖: size of the increment just before blending, or at the last refusal;
- full alpha: held-out loss with that seed at alpha 1, over the loss without;
- best a: held-out loss at the best amplitude of the line search, over the loss without;
- G2: seeds that the gate let into the forward path; kept: seeds committed in the end;
- peak: highest held-out loss while BLENDING over that of `none` in the same steps, mean (worst);
- final: test loss over that of `none` with the same random seed, mean and 95 % interval;
- verdict: worse or better where that interval leaves 1 out.

A second table sums that up, and a third shows the cost of a step while the seed learns over that of
the host alone, all arms in turn in one process. Finished runs are kept in a JSON-lines file, so
that an interrupted benchmark goes on where it was.

    python benchmarks/seed_objective.py [--seeds 5] [--cache FILE] [--arms A …] [--hosts H …]
        [--gates lax|default|unasked] [--germination-step N] [--markdown] [--cost-steps 100]
        [--picture FILE]
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from objective_hosts import HOSTS, OPTIMIZERS
from objective_runs import GATES, Key, Result, Run, Start
from objective_tables import (
    cost_table,
    draw_divergence,
    machine,
    outcome_table,
    summary_table,
)

ARMS = ("none", "plain", "proximal", "norm_cap", "correlation", "shadow", "live")
BEHIND = ("plain", "proximal", "norm_cap", "correlation", "shadow")


def load(cache: Path) -> dict[Key, Result]:
    """Return the finished runs of an earlier start."""
    if not cache.exists():
        return {}
    lines = cache.read_text(encoding="utf-8").splitlines()
    return {result.key: result for result in (Result(**json.loads(line)) for line in lines)}


def run_all(jobs: Sequence[Key], cache: Path) -> list[Result]:
    """Make the runs that are not in the cache yet; arms of one host share its first steps."""
    known, start = load(cache), None
    with Progress() as progress, cache.open("a", encoding="utf-8") as file:
        bar = progress.add_task("runs", total=len(jobs))
        for job in jobs:
            kind, step, host, optimizer, arm, seed, gates = job
            if job not in known:
                wanted = (host, optimizer, seed, step)
                if start is None or start.key != wanted:
                    start = Start(HOSTS[host], optimizer, seed, step)
                known[job] = Run(start, arm, kind, gates).go()
                file.write(json.dumps(asdict(known[job])) + "\n")
                file.flush()
            progress.advance(bar)
    return [known[job] for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--hosts", nargs="*", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--gates", choices=GATES, default="lax")
    parser.add_argument("--germination-step", type=int, help="for every host")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--cost-steps", type=int, default=100)
    parser.add_argument("--picture", type=Path, help="draw sizes behind the host over time")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "esper-seed-objective.jsonl"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=132)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    arms = ["none", *(arm for arm in options.arms if arm != "none")]
    forced = options.germination_step
    steps = {name: forced or case.germination_step for name, case in HOSTS.items()}
    pairs = itertools.product(options.hosts, OPTIMIZERS)
    cells = [(steps[host], host, optimizer) for host, optimizer in pairs]
    gates = options.gates
    lives = [("life", *cell, arm, seed, gates) for seed in seeds for cell in cells for arm in arms]
    results = run_all(lives, options.cache)
    console.print(f"{len(results)} runs, {machine()}")
    outcome_table(console, results, markdown=options.markdown)
    summary_table(console, results, markdown=options.markdown)
    if options.cost_steps:
        cost_table(
            console,
            [HOSTS[name] for name in options.hosts],
            arms,
            options.cost_steps,
            markdown=options.markdown,
        )
    if options.picture:
        behind = [
            ("behind", steps["MLP"], "MLP", optimizer, arm, seed, "lax")
            for seed in seeds
            for optimizer in OPTIMIZERS
            for arm in BEHIND
        ]
        draw_divergence(run_all(behind, options.cache), options.picture)


if __name__ == "__main__":
    main()
