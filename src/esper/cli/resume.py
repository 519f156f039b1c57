"""`esper resume`: go on with a run that was stopped."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from esper.cli.command_line import command_line
from esper.cli.grow import (
    Network,
    choose_view,
    conclude,
    note_trackers,
    train,
    train_control,
    views_beside,
)
from esper.cli.kept_settings import kept_settings
from esper.cli.options import AsJson, Report, bad_parameter, refuse_both
from esper.cli.printing import lasting_console
from esper.cli.report import leave_report
from esper.cli.stopping import ended_at_once_by_sigterm, stops_told
from esper.cli.views import RunView
from esper.experiments.run import GrowingRun
from esper.experiments.settings import SettingsError
from esper.experiments.stored_run import resumed_run
from esper.report.story import tell_run
from esper.seeds.registry import BlueprintError
from esper.tasks.task import TaskDataError
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.run_reader import RunReader
from esper.training.checkpoints import CheckpointError

_CANNOT_GO_ON = (
    BlueprintError,
    CheckpointError,
    ModuleNotFoundError,
    RunFolderError,
    SettingsError,
    TaskDataError,
)


def resume(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, as esper grow prints it.")
    ],
    control: Annotated[
        bool, typer.Option("--control", help="Then train the same host without growth.")
    ] = False,
    report: Report = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the run folder only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with RUN, which was killed or stopped, from its newest checkpoint.

    On a CPU the rest of the run is the same, to the bit, as if it had never stopped.
    """
    refuse_both(quiet=quiet, as_json=as_json)
    console = lasting_console()
    with bad_parameter(*_CANNOT_GO_ON):
        settings = kept_settings(RunReader(run))
    view = choose_view(console, settings, quiet=quiet, as_json=as_json)
    with stops_told(run, quiet=quiet, as_json=as_json):
        with bad_parameter(*_CANNOT_GO_ON), resumed_run(run, [view]) as growing:
            with view:
                _note_start(growing, run, view)
                train(growing, view)
            with ended_at_once_by_sigterm():
                networks: dict[str, Network] = {"grown": (growing.param_count(), growing.finish())}
        if control:
            beside = views_beside(console, settings, silent=quiet or as_json)
            networks = {**train_control(settings, beside), **networks}
    story = tell_run(RunReader(run))
    told = leave_report(run) if report else None
    conclude(console, run, story, networks, settings, told, quiet=quiet, as_json=as_json)


def _note_start(growing: GrowingRun, folder: Path, view: RunView) -> None:
    """Tell from where a run goes on, and what should be known of it."""
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
        view.note(f"paused, as it was told to be; {command_line('send', folder, 'resume')}")
