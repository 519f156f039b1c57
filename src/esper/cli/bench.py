"""`esper bench`: what do slots and a seed cost in a step?"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from esper.cli.options import (
    AsJson,
    ConfigFile,
    DryRun,
    bad_parameter,
    print_settings,
    run_settings,
    settings_asked,
)
from esper.cli.printing import plain_console, print_json_line
from esper.experiments.settings import SettingsError
from esper.experiments.step_costs import NUM_BLOCKS, Bench, StepCost
from esper.report.chart import si
from esper.tasks.task import TaskDataError
from esper.telemetry.environment import describe_device

_ERRORS = (SettingsError, TaskDataError, ModuleNotFoundError)


def bench(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="Whose host and batches, as for esper grow.")
    ],
    slot: Annotated[
        str | None, typer.Option(help="Where the seed stands; default the task's first.")
    ] = None,
    blueprint: Annotated[
        str | None,
        typer.Option(help="Of the seed; default what the heuristic would try first there."),
    ] = None,
    block_steps: Annotated[
        int, typer.Option(min=1, help=f"Steps of each network in each of {NUM_BLOCKS} blocks.")
    ] = 10,
    device: Annotated[
        str | None, typer.Option(help="Where to train: cpu, cuda, cuda:N; default cpu.")
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile host and seeds, and the plain modules whole.")
    ] = False,
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, as for esper grow."),
    ] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Time training steps of TASK's network with slots against plain modules, in turn.

    Nothing is kept, and nothing is trained to any end. On a busy machine the ratios still hold, as
    whatever else runs meets all networks alike.
    """
    asked = settings_asked(device=device)
    if compile_:
        asked["compile"] = {"enabled": True}
    settings = run_settings(task, config, set_, asked)
    console = plain_console()
    if dry_run:
        print_settings(console, settings, as_json=as_json)
        return
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with bad_parameter(*_ERRORS):
        measured = Bench(settings, slot=slot, blueprint=blueprint)
        costs = _measured(console, measured, block_steps, silent=as_json)
    if as_json:
        for cost in costs:
            print_json_line(console, asdict(cost))
        return
    console.print(
        f"{settings.task} on {describe_device(measured.device)}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads{', compiled' if settings.compile.enabled else ''}; "
        f"{measured.blueprint} in slot {measured.slot}; "
        f"{NUM_BLOCKS * block_steps} steps of each, in {NUM_BLOCKS} blocks",
        style="dim",
    )
    console.print(_table(costs))
    console.print("indented: held against the network of plain modules above", style="dim")


def _measured(console: Console, bench: Bench, block_steps: int, *, silent: bool) -> list[StepCost]:
    status = nullcontext() if silent else console.status("making the networks …")
    with status as shown:

        def tell(words: str) -> None:
            if shown is not None:
                shown.update(words)

        return bench.measure(block_steps, tell=tell)


def _table(costs: Sequence[StepCost]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("network")
    for name in ("params", "operations", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("ratio", "middle half"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        ratio = cost.ratio
        table.add_row(
            cost.network if ratio is None else f"  {cost.network}",
            f"{cost.param_count:,}",
            si(cost.flops),
            f"{cost.milliseconds:.2f} ms",
            "" if ratio is None else f"{ratio.median:.3f}",
            "" if ratio is None else f"{ratio.low:.3f} – {ratio.high:.3f}",
        )
    return table
