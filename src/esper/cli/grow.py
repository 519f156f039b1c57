"""`esper grow`: train a task and grow its host while it trains."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from esper.cli.command_line import command_line
from esper.cli.live_view import LiveView
from esper.cli.nothing_germinated import why_nothing_germinated
from esper.cli.options import (
    AsJson,
    ConfigFile,
    DryRun,
    Report,
    bad_parameter,
    new_folder,
    print_settings,
    refuse_both,
    run_settings,
    settings_asked,
)
from esper.cli.printing import lasting_console, plain_console, print_json_line
from esper.cli.report import leave_report
from esper.cli.stopping import ended_at_once_by_sigterm, stops_told
from esper.cli.tables import networks_table, print_compiled, print_seeds, print_twin
from esper.cli.views import JsonView, LinesView, QuietView, RunView
from esper.experiments.audit import ForkPoint, Twin, prepare_twin
from esper.experiments.config import RunConfig
from esper.experiments.parts import chosen_policy
from esper.experiments.run import GrowingRun, build_setup, prepare
from esper.experiments.settings import SettingsError
from esper.experiments.stored_run import stored_run
from esper.own_code import OWN_SCHEME
from esper.policies.named import NEVER, POLICY_NAMES
from esper.report.story import RunStory, tell_run
from esper.report.training_story import several
from esper.tasks.collection.address import SCHEMES, SETTINGS_HELP
from esper.tasks.named import TASKS
from esper.tasks.task import TaskDataError
from esper.telemetry.progress import progress_of
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.run_reader import RunReader
from esper.training.checkpoints import CheckpointError
from esper.training.run_cost import RunCost
from esper.training.safeguard import TrainingDivergedError

_KNOWN_TASKS = (*TASKS, *SCHEMES, OWN_SCHEME)

Network = tuple[int, dict[str, float]]
"""Its parameters, and how it did on the test split."""
Beside = Callable[[str], RunView]
"""Announces a run beside the grown one, and returns its view."""


def grow(
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK",
            help=f"What to train: {', '.join(_KNOWN_TASKS)}. With a data set, {SETTINGS_HELP}.",
        ),
    ] = None,
    task_option: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="The same as the argument.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"Who decides: {', '.join(POLICY_NAMES)}, {OWN_SCHEME}, or the file of a learned "
            "policy; default the task's own.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="How many; growth is decided after each.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes weights, data order, decisions.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to train: cpu, cuda, cuda:N; default cpu.")
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run host and seeds compiled by torch.compile.")
    ] = False,
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="One setting, as slot.ramp_steps=30; none switches off.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/TASK-TIME.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the same host without growth.")
    ] = False,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Also train its twin, never grown, with as many operations: did growth pay?",
        ),
    ] = False,
    report: Report = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the run folder only.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train TASK and grow its network while it trains."""
    refuse_both(quiet=quiet, as_json=as_json)
    asked = settings_asked(epochs=epochs, policy=policy, random_seed=seed, device=device)
    if compile_:
        asked["compile"] = {"enabled": True}
    settings = run_settings(only_task(task, task_option), config, set_, asked)
    _check(settings, audit=audit)
    if dry_run:
        print_settings(plain_console(), settings, as_json=as_json)
        return
    console = lasting_console()
    folder = new_folder(out, settings.task)
    view = choose_view(console, settings, quiet=quiet, as_json=as_json)
    beside = views_beside(console, settings, silent=quiet or as_json)
    with stops_told(folder, quiet=quiet, as_json=as_json):
        networks = _train_grown(settings, folder, view, beside if audit else None)
        if control:
            networks = {**train_control(settings, beside), **networks}
    told = leave_report(folder) if report else None
    story = tell_run(RunReader(folder))
    conclude(console, folder, story, networks, settings, told, quiet=quiet, as_json=as_json)


def _check(settings: RunConfig, *, audit: bool) -> None:
    with bad_parameter(SettingsError):
        chosen_policy(settings)
    if audit and settings.policy == NEVER:
        raise typer.BadParameter("--audit asks whether growth paid, and the policy never grows")
    if audit and not settings.count_flops:
        raise typer.BadParameter(
            "--audit gives the twin as many operations; leave out count_flops=false"
        )


def only_task(argument: str | None, option: str | None) -> str:
    """Return the one task that is named, as an argument or as an option."""
    if (argument is None) == (option is None):
        given = "is missing" if argument is None else f"is given twice: {argument}, --task {option}"
        raise typer.BadParameter(
            f"the task {given}; name it once, as esper grow digits; "
            f"tasks: {', '.join(_KNOWN_TASKS)}"
        )
    return argument or option or ""


def choose_view(console: Console, settings: RunConfig, *, quiet: bool, as_json: bool) -> RunView:
    """Return what shows a run on this console."""
    if quiet:
        return QuietView()
    if as_json:
        return JsonView(console)
    unit = progress_of(settings.model_dump()).unit
    if console.is_terminal:
        return LiveView(console, settings.task, unit=unit)
    return LinesView(console, unit=unit)


def views_beside(console: Console, settings: RunConfig, *, silent: bool) -> Beside:
    """Return what announces runs beside the grown one, in lines and never in JSON."""

    def announce(words: str) -> RunView:
        if not silent:
            console.print(words)
        return choose_view(console, settings, quiet=silent, as_json=False)

    return announce


def _train_grown(
    settings: RunConfig, folder: Path, view: RunView, beside: Beside | None
) -> dict[str, Network]:
    """Train and grow into a run folder, and the twin too if there is to be one.

    What data, folder or host refuse is a bad parameter.
    """
    with bad_parameter(SettingsError, TaskDataError, ModuleNotFoundError):
        setup = build_setup(settings)
    with (
        bad_parameter(CheckpointError, RunFolderError, SettingsError),
        stored_run(settings, folder, setup, [view]) as run,
    ):
        fork = None if beside is None else ForkPoint(run.growth)
        with view:
            for note in setup.notes:
                view.note(note, about="data")
            note_trackers(run, view)
            cost = train(run, view)
        with ended_at_once_by_sigterm():  # there is no step to wait for any more
            networks = {"grown": (run.param_count(), run.finish())}
            if beside is not None and fork is not None:
                try:
                    twin = prepare_twin(settings, run, cost, fork)
                except ValueError as error:
                    beside(f"no twin: {error}")
                else:
                    networks = {**_train_twin(twin, run, beside), **networks}
        return networks


def train_control(settings: RunConfig, beside: Beside) -> dict[str, Network]:
    """Train the same host with the same data and steps, without growth; nothing if it diverges."""
    view = beside("the same host without growth, for comparison")
    run = prepare(settings.model_copy(update={"policy": NEVER}))
    try:
        with view:
            train(run, view)
    except TrainingDivergedError as error:
        return _left_out("host alone", error)
    return {"host alone": (run.param_count(), run.finish())}


def _train_twin(twin: Twin, grown: GrowingRun, beside: Beside) -> dict[str, Network]:
    """Train a host that never grows for as many operations as growth took, as `train_control`."""
    view = beside(
        "its twin for comparison: never grown, as many operations "
        f"(epochs: {twin.config.trainer.epochs}), the same run up to step {twin.shared_steps}"
    )
    try:
        with view:
            cost = train(twin.run, view)
    except TrainingDivergedError as error:
        return _left_out("its twin", error)
    finished = twin.finish(cost, grown)
    return {"its twin": (finished.param_count, finished.metrics)}


def _left_out(name: str, error: TrainingDivergedError) -> dict[str, Network]:
    """Tell that a run beside the grown one has come to nothing, which is no fault of that one."""
    typer.echo(f"{name} is left out: {error}", err=True)
    return {}


def note_trackers(run: GrowingRun, view: RunView) -> None:
    """Tell where each tracker's tool finds the run."""
    for tracker in run.trackers:
        view.note(tracker.place, about="tracked")


def train(run: GrowingRun, view: RunView) -> RunCost:
    """Train a run to its end, and return what it has cost.

    Raises:
        RunStoppedError: It was told to end before, by a command or SIGTERM.
    """
    view.follow(run)
    with _ended_by_sigterm(run):
        for report in run.reports:
            view.epoch(report, run.growth.slots)
    return run.growth.meter.cost


@contextmanager
def _ended_by_sigterm(run: GrowingRun) -> Iterator[None]:
    """Let SIGTERM end the run between two steps, with a checkpoint; a second one ends it at once.

    Only a run that can be controlled, in the main thread, which alone may take signals.
    """
    control = run.trainer.control
    if control is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        control.end("SIGTERM")
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def conclude(
    console: Console,
    folder: Path,
    story: RunStory,
    networks: Mapping[str, Network],
    settings: RunConfig,
    report: str | None,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Print what grew, how each network did, and where the run and its report are."""
    if quiet:
        console.out(str(folder), highlight=False)
    elif as_json:
        print_json_line(console, _summary(folder, story, networks))
    else:
        _print_end(console, folder, story, networks, settings)
        _print_places(console, folder, report)


def _summary(folder: Path, story: RunStory, networks: Mapping[str, Network]) -> dict[str, Any]:
    return {
        "kind": "summary",
        "folder": str(folder),
        "networks": {
            name: {"params": params, "test": metrics}
            for name, (params, metrics) in networks.items()
        },
        "seeds": [
            {
                "slot": seed.slot,
                "blueprint": seed.blueprint,
                "params": seed.param_count,
                "outcome": seed.outcome,
                "contribution_fraction": seed.contribution_fraction,
                "reason": seed.reason,
            }
            for seed in story.seeds
        ],
    }


def _print_end(
    console: Console,
    folder: Path,
    story: RunStory,
    networks: Mapping[str, Network],
    settings: RunConfig,
) -> None:
    """Print what grew, and how each network did."""
    console.print()
    num_decisions = RunReader(folder).glance().epoch
    print_seeds(console, story, why_none=why_nothing_germinated(settings, num_decisions))
    console.print()
    console.print(networks_table(networks))
    living = sum(seed.end_step is None for seed in story.seeds)
    if living:
        console.print(
            f"grown was tested without {several(living, 'seed')} still growing: only what is "
            "committed is part of it",
            style="yellow",
        )
    if settings.compile.enabled:
        console.print()
        print_compiled(console, story)
    if story.finished is not None and story.twin is not None:
        console.print()
        print_twin(console, story.finished, story.twin)


def _print_places(console: Console, folder: Path, report: str | None) -> None:
    """Print where the run is, how its story is told, and where its report is."""
    console.print()
    console.print("run folder  ", end="")
    console.print(str(folder), style="bold", soft_wrap=True)
    story_command = command_line("inspect", folder)
    for line in (f"its story   {story_command}", report):
        if line is not None:
            console.print(line, soft_wrap=True)
