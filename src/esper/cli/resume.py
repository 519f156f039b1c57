"""`esper resume`: go on with a run that was stopped."""

import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from esper.cli.grow import (
    Network,
    choose_view,
    conclude,
    note_trackers,
    program,
    tell_stopped,
    train,
    train_control,
    views_beside,
)
from esper.cli.report import leave_report
from esper.experiments.config import RunConfig
from esper.experiments.run import resumed_run
from esper.experiments.settings import SettingsError
from esper.report.story import tell
from esper.seeds.registry import BlueprintError
from esper.tasks.task import TaskDataError
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_store import RunFolderError, RunReader
from esper.training.checkpoints import CheckpointError
from esper.training.control import RunStoppedError

_CANNOT_GO_ON = (
    BlueprintError,
    CheckpointError,
    ModuleNotFoundError,
    RunFolderError,
    SettingsError,
    TaskDataError,
)


def resume(
    run: Annotated[Path, typer.Argument(help="Run folder, as esper grow prints it.")],
    control: Annotated[
        bool, typer.Option("--control", help="Then train the same host without growth.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option(help="Write the run's report into its folder (needs esper-lite\\[report])."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the run folder only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Go on with RUN, which was killed or stopped, from its newest checkpoint.

    On a CPU the rest of the run is the same, to the bit, as if it had never stopped.
    """
    if quiet and as_json:
        raise typer.BadParameter("--quiet and --json exclude each other")
    console = Console()
    try:
        kept = RunReader(run).config()
        if training_settings(kept) is not None:
            raise typer.BadParameter(
                f"{run} holds the training of a policy, and no run of a network; go on with it by: "
                f"{program()} policy train --out {shlex.quote(str(run))}"
            )
        settings = RunConfig.model_validate(kept)
        view = choose_view(console, settings.task, quiet=quiet, as_json=as_json)
        with resumed_run(run, [view]) as growing:
            with view:
                found = growing.resumed
                if found is None:
                    view.note("no checkpoint was made yet: the run begins anew")
                else:
                    for event in found.damaged:
                        view.note(f"passed over {event.name}: {event.error}")
                    if found.info.torch_version != torch.__version__:
                        view.note(
                            f"begun with torch {found.info.torch_version}, this is "
                            f"{torch.__version__}: the rest may differ in rounding"
                        )
                note_trackers(growing, view)
                if growing.trainer.control is not None and growing.trainer.control.paused:
                    view.note(f"paused, as it was told to be; {program()} send {run} resume")
                train(growing, view)
            networks: dict[str, Network] = {"grown": (growing.param_count(), growing.finish())}
    except RunStoppedError as stopped:
        raise tell_stopped(stopped, run, quiet=quiet, as_json=as_json) from stopped
    except _CANNOT_GO_ON as error:
        raise typer.BadParameter(str(error)) from error
    if control:
        beside = views_beside(console, settings.task, silent=quiet or as_json)
        networks = {"host alone": train_control(settings, beside), **networks}
    story = tell(RunReader(run).events())
    told = leave_report(run) if report else None
    conclude(console, run, story, networks, settings, told, quiet=quiet, as_json=as_json)
