"""`esper policy`: train a policy that decides when to grow, and see what policies are worth."""

import json
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from esper.cli.grow import folder_name, program
from esper.cli.policy_views import EvaluationView, TrainingView, print_evaluation, print_training
from esper.experiments.settings import SettingsError, explain
from esper.experiments.worker_pool import WorkerDiedError
from esper.policies.heuristic import HeuristicPolicy
from esper.policies.named import POLICY_NAMES, policy_of_anywhere
from esper.tasks.task import TaskDataError
from esper.telemetry.run_store import RunFolderError

if TYPE_CHECKING:
    from esper.rl.policy_run import PolicyRun
    from esper.rl.training_report import TrainingReport

policy = typer.Typer(
    name="policy",
    help="Train a policy that decides when to grow, and compare policies.",
    no_args_is_help=True,
)

_NEEDS_RL = "learning to grow needs gymnasium and sb3-contrib: pip install 'esper-lite[rl]'"

Quiet = Annotated[bool, typer.Option("--quiet", help="Print what was written only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


@policy.command()
def train(
    task: Annotated[
        str | None, typer.Argument(help="Whose runs are the episodes; left out to go on in --out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Decisions to learn from, of all environments.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Environments at a time; default one per CPU.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Length of an episode; growth is decided after each.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes weights and episodes.")] = None,
    imitate: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="First learn to do what this policy does."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help=r"Run the environments on a Ray cluster; local starts one (esper-lite\[ray]).",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="One setting: of the runs, as for esper grow, or training.KEY, rewards.KEY, "
            "network.KEY, actions.KEY, episodes.KEY, demonstrations.KEY.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/policy-TASK-TIME.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and stop.")
    ] = False,
) -> None:
    """Learn from runs of TASK when and where to grow.

    The policy is in FOLDER/policy.safetensors from the first rollout on: esper grow --policy FILE.
    """
    if quiet and as_json:
        raise typer.BadParameter("--quiet and --json exclude each other")
    console = Console()
    view = TrainingView(console, quiet=quiet, as_json=as_json)
    with _errors():
        from esper.rl import policy_run  # noqa: PLC0415 – an optional extra

        if task is None:
            if out is None:
                raise typer.BadParameter("name a task, or a folder to go on in: --out FOLDER")
            _refuse(
                workers=workers,
                epochs=epochs,
                seed=seed,
                imitate=imitate,
                ray=ray,
                config=config,
                set_=set_,
            )
            if dry_run:
                kept = policy_run.policy_run_config(out, total_steps=steps)
                console.out(kept.model_dump_json(indent=2), highlight=False)
                return
            opened = policy_run.resumed_policy_run(out, total_steps=steps)
            _train(opened, out, view, console, quiet=quiet, as_json=as_json)
            return
        training = {"total_steps": steps, "num_workers": workers}
        training |= {"random_seed": seed}
        options: dict[str, Any] = {
            "training": {key: value for key, value in training.items() if value is not None},
            **({} if ray is None else {"ray": ray}),
            **({} if imitate is None else {"demonstrations": {"policy": imitate}}),
            **({} if epochs is None else {"trainer": {"epochs": epochs}}),
        }
        settings = policy_run.load_policy_run_config(task, config, set_ or [], options)
        if dry_run:
            console.out(settings.model_dump_json(indent=2), highlight=False)
            return
        name = folder_name(settings.run.task, datetime.now(UTC))
        folder = out or Path("runs") / f"policy-{name}"
        opened = policy_run.new_policy_run(settings, folder)
        _train(opened, folder, view, console, quiet=quiet, as_json=as_json)


def _train(
    opened: AbstractContextManager["PolicyRun"],
    folder: Path,
    view: TrainingView,
    console: Console,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train to the end, and tell what came of it.

    A training that is stopped, or comes to nothing, is told without a traceback.
    """
    from esper.rl.policy_run import can_go_on  # noqa: PLC0415 – an optional extra
    from esper.rl.policy_training import PolicyDivergedError  # noqa: PLC0415
    from esper.rl.workers import WorkersFailedError  # noqa: PLC0415

    def onward() -> str:
        if can_go_on(folder):
            return f"go on with: {program()} policy train --out {shlex.quote(str(folder))}"
        return "nothing was learned yet; begin anew, in another folder"

    reports: list[TrainingReport] = []
    try:
        with opened as run:
            view.begin(run.config, run.resumed_at)
            with view:
                for number, likelihood in enumerate(run.imitate(), start=1):
                    view.imitation(number, likelihood)
                for report in run.reports():
                    reports.append(report)
                    view.rollout(report)
    except KeyboardInterrupt:
        typer.echo(f"stopped; {onward()}", err=True)
        raise typer.Exit(130) from None
    except (PolicyDivergedError, WorkersFailedError) as error:
        typer.echo(_whole(error), err=True)
        if isinstance(error, WorkersFailedError):  # what diverged would come to the same again
            typer.echo(onward(), err=True)
        raise typer.Exit(1) from error
    if quiet:
        console.out(str(run.policy_file), highlight=False)
    elif as_json:
        summary = {"kind": "summary", "folder": str(run.folder), "policy": str(run.policy_file)}
        console.out(json.dumps(summary), highlight=False)
    else:
        print_training(console, reports, resumed_at=run.resumed_at)
        _print_ways_on(console, run)


def _print_ways_on(console: Console, run: "PolicyRun") -> None:
    console.print()
    task, file = shlex.quote(run.config.run.task), shlex.quote(str(run.policy_file))
    for what, command in (
        ("policy", str(run.policy_file)),
        ("deploy it", f"{program()} grow {task} --policy {file}"),
        ("weigh it", f"{program()} policy eval {task} --policy {file} --policy random"),
    ):
        console.print(f"{what:11} {command}", highlight=False, soft_wrap=True, markup=False)


def _whole(error: BaseException) -> str:
    """Return an error with its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def _refuse(**given: Any) -> None:
    named = [f"--{name.rstrip('_')}" for name, value in given.items() if value is not None]
    if named:
        raise typer.BadParameter(
            f"a training goes on with its own settings, and {', '.join(named)} would change them; "
            "leave that out, or name a task and another folder"
        )


@policy.command("eval")
def eval_(
    task: Annotated[str, typer.Argument(help="Whose runs the policies decide for.")],
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME|FILE",
            help=f"One of {', '.join(POLICY_NAMES)}, or the file of a learned policy; again for "
            "more. Default: all that have a name.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random seeds; an interval needs two.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The lowest of them.")] = 0,
    budget_of: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="The policy whose operations all others get, seed by seed, in longer or shorter "
            "runs.",
        ),
    ] = HeuristicPolicy.name,
    epochs: Annotated[int | None, typer.Option(min=1, help="Length of its runs.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; may be that of a training.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="One setting: of the runs, as for esper grow, or rewards.KEY.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; one begun before goes on where it was.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default one per CPU.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Let policies decide for the same runs of TASK with as many operations, and compare."""
    if quiet and as_json:
        raise typer.BadParameter("--quiet and --json exclude each other")
    console = Console()
    with _errors():
        from esper.rl import evaluation  # noqa: PLC0415 – an optional extra
        from esper.rl.policy_run import SECTIONS, load_policy_run_config  # noqa: PLC0415

        options: dict[str, Any] = {"count_flops": True}
        if epochs is not None:
            options["trainer"] = {"epochs": epochs}
        given = set_ or []
        _refuse_training_settings(given, {*SECTIONS} - {"rewards"})
        gamma = [one for one in given if one.startswith("rewards.gamma=")]
        alike = [one.replace("rewards", "training", 1) for one in gamma]  # as a training wants it
        loaded = load_policy_run_config(task, config, [*given, *alike], options)
        chosen = {
            "run": loaded.run,
            "policies": tuple(policy_of_anywhere(policy) for policy in names or POLICY_NAMES),
            "random_seeds": tuple(range(first_seed, first_seed + seeds)),
            "rewards": loaded.rewards,
            "budget_of": policy_of_anywhere(budget_of),
        }
        try:
            settings = evaluation.EvaluationConfig.model_validate(chosen)
        except ValidationError as error:
            raise SettingsError(explain(error, evaluation.EvaluationConfig)) from error
        name = folder_name(settings.run.task, datetime.now(UTC))
        path = out or Path("runs") / f"policy-eval-{name}"
        if not evaluation.holds_evaluation(path):
            evaluation.check_policies(settings)
        folder = evaluation.EvaluationFolder(path, settings)
        view = EvaluationView(console, settings, quiet=quiet, as_json=as_json)
        try:
            with view:
                done = evaluation.evaluate(
                    settings, folder, processes=processes or os.cpu_count() or 1, on_run=view.run
                )
        except KeyboardInterrupt:
            typer.echo(f"stopped; the same command with --out {path} goes on", err=True)
            raise typer.Exit(130) from None
    if quiet:
        console.out(str(path), highlight=False)
    elif as_json:
        console.out(json.dumps({"kind": "summary", "folder": str(path)}), highlight=False)
    else:
        print_evaluation(console, done)
        console.print(f"\nfolder  {path}", highlight=False, soft_wrap=True, markup=False)


def _refuse_training_settings(settings: Sequence[str], sections: Collection[str]) -> None:
    """Raise if a setting is of one of these sections, which mean nothing to an evaluation."""
    for setting in settings:
        if setting.split("=")[0].split(".")[0] in sections:
            raise SettingsError(
                f"{setting} is of a training, and an evaluation trains no policy; leave it out"
            )


@contextmanager
def _errors() -> Iterator[None]:
    """Let what settings, folders and data refuse be a bad parameter."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("gymnasium", "stable_baselines3", "sb3_contrib"):
            raise typer.BadParameter(_NEEDS_RL) from error
        raise typer.BadParameter(str(error)) from error
    except (RunFolderError, SettingsError, TaskDataError, ConnectionError, ValueError) as error:
        raise typer.BadParameter(_whole(error)) from error
    except WorkerDiedError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
