"""`esper policy`: train a policy that decides when to grow, and see what policies are worth."""

import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from esper.cli.command_line import command_line
from esper.cli.options import (
    AsJson,
    ConfigFile,
    DryRun,
    new_folder,
    print_settings,
    refuse_both,
    refuse_changes,
    refuse_neither,
    settings_asked,
)
from esper.cli.policy_views import (
    EvaluationView,
    TrainingView,
    evaluation_record,
    print_evaluation,
    print_training,
)
from esper.cli.printing import lasting_console, plain_console, print_json_line
from esper.cli.stopping import EXIT_INTERRUPTED, tell_interrupted
from esper.experiments.parts import chosen_policy
from esper.experiments.settings import SettingsError, explain
from esper.experiments.worker_pool import WorkerDiedError
from esper.policies.heuristic import HeuristicPolicy
from esper.policies.named import POLICY_NAMES, policy_of_anywhere
from esper.report.training_story import tell_training
from esper.tasks.task import TaskDataError
from esper.telemetry.run_folder import RunFolderError
from esper.telemetry.run_reader import RunReader

if TYPE_CHECKING:
    from esper.rl.evaluation import Evaluation, EvaluationConfig, EvaluationFolder
    from esper.rl.policy_run import PolicyRun

policy = typer.Typer(
    name="policy",
    help="Train a policy that decides when to grow, and compare policies.",
    no_args_is_help=True,
)

_NEEDS_RL = "learning to grow needs gymnasium and sb3-contrib: pip install 'esper-lite[rl]'"

Quiet = Annotated[bool, typer.Option("--quiet", help="Print what was written only.")]


@policy.command()
def train(
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK", help="Whose runs are the episodes; left out to go on in --out."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Decisions to learn from, of all environments; whole rollouts are made."
        ),
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
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="One setting: of the runs, as for esper grow, or training.KEY, rewards.KEY, "
            "network.KEY, observation.KEY, actions.KEY, episodes.KEY, demonstrations.KEY.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/policy-TASK-TIME.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Learn from runs of TASK when and where to grow.

    The policy is in FOLDER/policy.safetensors from the first rollout on: esper grow --policy FILE.
    """
    refuse_both(quiet=quiet, as_json=as_json)
    of_its_own: dict[str, object] = {"workers": workers, "epochs": epochs, "seed": seed}
    of_its_own |= {"imitate": imitate, "ray": ray, "config": config, "set": set_}
    with policy_errors():
        from esper.rl import policy_run_config, stored_policy_run  # noqa: PLC0415 – an extra

        if task is None:
            folder = _begun_folder(out, of_its_own)
            settings = policy_run_config.policy_run_config(folder, total_steps=steps)
            opened = stored_policy_run.resumed_policy_run(folder, total_steps=steps)
        else:
            asked = _training_asked(
                {"total_steps": steps, "num_workers": workers, "random_seed": seed},
                epochs=epochs,
                ray=ray,
                imitate=imitate,
            )
            settings = policy_run_config.load_policy_run_config(task, config, set_ or [], asked)
            folder = new_folder(out, settings.run.task, kind="policy-")
            opened = stored_policy_run.new_policy_run(settings, folder)
        if dry_run:
            print_settings(plain_console(), settings, as_json=as_json)
            return
        console = lasting_console()
        view = TrainingView(console, quiet=quiet, as_json=as_json)
        run = _train(opened, folder, view)
    _print_trained(console, run, quiet=quiet, as_json=as_json)


def _begun_folder(out: Path | None, of_its_own: Mapping[str, object]) -> Path:
    """Return the folder of the training that is to go on, if it does so with its own settings."""
    if out is None:
        refuse_neither()
    refuse_changes("a training", [name for name, value in of_its_own.items() if value is not None])
    if not out.exists():
        raise typer.BadParameter(
            f"{out} is no run folder, it does not exist; name a task to begin a training there"
        )
    return out


def _training_asked(
    training: dict[str, int | None], *, epochs: int | None, ray: str | None, imitate: str | None
) -> dict[str, Any]:
    """Return the settings that the options of a new training ask for."""
    return settings_asked(
        epochs=epochs,
        training=settings_asked(**training),
        ray=ray,
        demonstrations=None if imitate is None else {"policy": imitate},
    )


def _train(
    opened: AbstractContextManager["PolicyRun"], folder: Path, view: TrainingView
) -> "PolicyRun":
    """Train to the end, and return the run.

    A training that is stopped, or comes to nothing, is told without a traceback.
    """
    from esper.rl.policy_training import PolicyDivergedError  # noqa: PLC0415 – an optional extra
    from esper.rl.workers import WorkersFailedError  # noqa: PLC0415

    try:
        with opened as run:
            view.begin(run.config, run.resumed_at)
            with view:
                for number, likelihood in enumerate(run.imitate(), start=1):
                    view.imitation(number, likelihood, num_left_out=run.num_left_out)
                for report in run.reports():
                    view.rollout(report)
    except KeyboardInterrupt:
        tell_interrupted(_way_on(folder))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (PolicyDivergedError, WorkersFailedError) as error:
        typer.echo(_whole(error), err=True)
        if isinstance(error, WorkersFailedError):  # what diverged would come to the same again
            typer.echo(_way_on(folder), err=True)
        raise typer.Exit(1) from error
    return run


def _way_on(folder: Path) -> str:
    """Return how a training that was stopped goes on."""
    try:
        RunReader(folder)
    except RunFolderError:
        return "the training had not begun"
    return f"go on with: {command_line('policy', 'train', '--out', folder)}"


def _print_trained(console: Console, run: "PolicyRun", *, quiet: bool, as_json: bool) -> None:
    """Print what a training came to, where its policy is, and what can be done with that."""
    if quiet:
        console.out(str(run.policy_file), highlight=False)
        return
    if as_json:
        summary = {"kind": "summary", "folder": str(run.folder), "policy": str(run.policy_file)}
        print_json_line(console, summary)
        return
    if run.resumed_at == run.training.learner.num_timesteps:
        console.print("nothing was left to learn; for more decisions add --steps", highlight=False)
    else:
        print_training(console, tell_training(RunReader(run.folder)))
    console.print()
    task, file = run.config.run.task, run.policy_file
    for what, way in (
        ("policy", str(file)),
        ("deploy it", command_line("grow", task, "--policy", file)),
        (
            "weigh it",
            command_line("policy", "eval", task, "--policy", file, "--policy", "random"),
        ),
    ):
        console.print(f"{what:11} {way}", highlight=False, soft_wrap=True, markup=False)


def _whole(error: BaseException) -> str:
    """Return an error with its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@policy.command("eval")
def eval_(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="Whose runs the policies decide for.")
    ],
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
        Path | None,
        typer.Option(
            help="Folder; default runs/policy-eval-TASK-TIME. One begun before goes on where it "
            "was."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default one per CPU.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Let policies decide for the same runs of TASK with as many operations, and compare."""
    refuse_both(quiet=quiet, as_json=as_json)
    with policy_errors():
        settings = _evaluation_settings(
            task,
            config,
            set_ or [],
            epochs,
            policies=tuple(policy_of_anywhere(policy) for policy in names or POLICY_NAMES),
            random_seeds=tuple(range(first_seed, first_seed + seeds)),
            budget_of=policy_of_anywhere(budget_of),
        )
        if dry_run:
            print_settings(plain_console(), settings, as_json=as_json)
            return
        console = lasting_console()
        folder = _open_evaluation(new_folder(out, settings.run.task, kind="policy-eval-"), settings)
        view = EvaluationView(console, settings, quiet=quiet, as_json=as_json)
        done = _evaluate(folder, settings, view, processes or os.cpu_count() or 1)
    if quiet:
        console.out(str(folder.path), highlight=False)
    elif as_json:
        summary = {"kind": "summary", "folder": str(folder.path), **evaluation_record(done)}
        print_json_line(console, summary)
    else:
        print_evaluation(console, done)
        console.print(f"\nfolder  {folder.path}", highlight=False, soft_wrap=True, markup=False)


def _evaluation_settings(
    task: str, file: Path | None, given: Sequence[str], epochs: int | None, **chosen: Any
) -> "EvaluationConfig":
    """Return the settings of an evaluation.

    Raises:
        SettingsError: One is wrong, or of a training only, or there is no such policy.
    """
    from esper.rl.evaluation import EvaluationConfig  # noqa: PLC0415 – an optional extra
    from esper.rl.policy_run_config import SECTIONS, load_policy_run_config  # noqa: PLC0415

    _refuse_training_settings(given, {*SECTIONS} - {"rewards"})
    gamma = [one for one in given if one.startswith("rewards.gamma=")]
    alike = [one.replace("rewards", "training", 1) for one in gamma]  # as a training wants it
    asked = settings_asked(epochs=epochs, count_flops=True)
    loaded = load_policy_run_config(task, file, [*given, *alike], asked)
    try:
        settings = EvaluationConfig.model_validate(
            {"run": loaded.run, "rewards": loaded.rewards, **chosen}
        )
    except ValidationError as error:
        raise SettingsError(explain(error, EvaluationConfig)) from error
    for policy in settings.all_policies:
        chosen_policy(settings.run.model_copy(update={"policy": policy}))
    return settings


def _open_evaluation(path: Path, settings: "EvaluationConfig") -> "EvaluationFolder":
    """Return the folder, begun if there was none: only where every policy can decide."""
    from esper.rl import evaluation  # noqa: PLC0415 – an optional extra

    if not evaluation.holds_evaluation(path):
        evaluation.check_policies(settings)
    return evaluation.EvaluationFolder(path, settings)


def _evaluate(
    folder: "EvaluationFolder", settings: "EvaluationConfig", view: EvaluationView, processes: int
) -> "Evaluation":
    """Make the runs that are missing, and show how far they are."""
    from esper.rl import evaluation  # noqa: PLC0415 – an optional extra

    try:
        with view:
            return evaluation.evaluate(settings, folder, processes=processes, on_run=view.run)
    except KeyboardInterrupt:
        out = shlex.quote(str(folder.path))
        tell_interrupted(f"the same command with --out {out} goes on")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _refuse_training_settings(settings: Sequence[str], sections: Collection[str]) -> None:
    """Raise if a setting is of one of these sections, which mean nothing to an evaluation."""
    for setting in settings:
        if setting.split("=")[0].split(".")[0] in sections:
            raise SettingsError(
                f"{setting} is of a training, and an evaluation trains no policy; leave it out"
            )


@contextmanager
def policy_errors() -> Iterator[None]:
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
