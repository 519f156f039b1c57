"""`esper compile`: what may grow, compiled before it does."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.options import AsJson, Imports, bad_parameter, import_modules
from esper.cli.printing import plain_console, print_json_line
from esper.compilation import ArtefactError, ArtefactStore, CompileService
from esper.compilation.alone import seed_alone
from esper.compilation.artefact_store import Artefact
from esper.compilation.compile_job import CompileJob, JobError
from esper.compilation.compiled_host import seed_options
from esper.compilation.feature_guards import FeatureGuards, dtype_named
from esper.compilation.inductor_cache import CacheFolderError
from esper.experiments.config import CompileConfig
from esper.experiments.parts import artefact_store
from esper.experiments.settings import SettingsError, explain
from esper.lifecycle.learning import Isolation
from esper.seeds.registry import BlueprintError, Family
from esper.slots.config import SlotConfig
from esper.training.precision import set_matmul_precision

_CHANNELS_FIRST_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What became of one blueprint, or of one artefact in the store."""

    blueprint: str
    features: str
    outcome: Literal["compiled", "was there", "failed", "refused"]
    cold_ms: float | None = None
    warm_ms: float | None = None
    num_bytes: int | None = None
    error: str | None = None


def compile_(
    blueprint: Annotated[
        list[str] | None, typer.Option(help="What may grow; several times for several.")
    ] = None,
    imports: Imports = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Of the features, batch first: 64,32,16,16 (images) or 64,128,96."),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the features; must be the shape's.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="cnn or transformer; default by the shape.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="As threads of the run: 1 for bundled tasks; default torch's choice."
        ),
    ] = None,
    isolation: Annotated[
        str, typer.Option(help=f"{', '.join(Isolation)}: as slot.isolation of the run.")
    ] = Isolation.NONE.value,
    mode: Annotated[str, typer.Option(help="Of torch.compile.")] = "default",
    store: Annotated[
        str | None, typer.Option(help="Folder or URL; default a folder in your caches.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Keys that sign and verify; default your own.")
    ] = None,
    limit_seconds: Annotated[float, typer.Option(help="For one blueprint.")] = 600.0,
    list_: Annotated[
        bool, typer.Option("--list", help="Show what is kept, each verified, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile seeds ahead of a run, in another process, and keep the result signed.

    A run with --compile, the same torch and the same machine then finds them ready, if its
    settings that they depend on are the default ones but for the options here.
    """
    console = plain_console()
    import_modules(imports)
    config = _config(store=store, key_file=key_file, limit_seconds=limit_seconds, mode=mode)
    with bad_parameter(SettingsError):
        kept = artefact_store(config)
    if list_:
        rows = list(_kept(kept))
    else:
        names = blueprint or _no_blueprint()
        if threads is not None:
            torch.set_num_threads(threads)
        set_matmul_precision("highest")
        features = _features(shape, width, dtype, device, family)
        slot = _slot_config(isolation)
        jobs = [_job(name, features, family, slot, config) for name in names]
        rows = _compile_all(jobs, kept, config, console if not as_json else None)
    if as_json:
        for row in rows:
            print_json_line(console, asdict(row))
    else:
        _print(console, rows, kept)
    if any(row.error is not None for row in rows):
        raise typer.Exit(1)


def _config(**asked: Any) -> CompileConfig:
    try:
        return CompileConfig.model_validate({"enabled": True, **asked})
    except ValidationError as error:
        raise typer.BadParameter(explain(error, CompileConfig)) from error


def _features(
    shape: str | None, width: int | None, dtype: str, device: str, family: str | None
) -> FeatureGuards:
    sizes = _sizes(shape)
    if device == "meta":
        raise typer.BadParameter("--device meta computes nothing; name the device of the run")
    with bad_parameter(ValueError):
        of_dtype = dtype_named(dtype)
    try:
        example = torch.empty(sizes, dtype=of_dtype, device=device)
    except (AssertionError, RuntimeError) as error:
        raise typer.BadParameter(f"no such features on --device {device}: {error}") from error
    channels_first = len(sizes) == _CHANNELS_FIRST_DIMENSIONS and family != Family.TRANSFORMER
    found = sizes[1] if channels_first else sizes[-1]
    if width is not None and width != found:
        raise typer.BadParameter(f"--width is {width}, and features of shape {shape} have {found}")
    return FeatureGuards.of(example.requires_grad_())


def _sizes(shape: str | None) -> list[int]:
    """Return what --shape says."""
    wrong = (
        "--shape is the features' shape, batch first, as 64,32,16,16; "
        f"{'it is missing' if shape is None else f'got {shape!r}'}"
    )
    try:
        sizes = [int(size) for size in (shape or "").split(",")]
    except ValueError as error:
        raise typer.BadParameter(wrong) from error
    if min(sizes) < 1:
        raise typer.BadParameter(wrong)
    return sizes


def _slot_config(isolation: str) -> SlotConfig:
    try:
        return SlotConfig.model_validate({"isolation": isolation})
    except ValidationError as error:
        raise typer.BadParameter(
            f"no isolation {isolation!r}; known: {', '.join(Isolation)}"
        ) from error


def _no_blueprint() -> list[str]:
    raise typer.BadParameter("--blueprint is missing; esper blueprints lists what there is")


def _job(
    name: str, features: FeatureGuards, family: str | None, slot: SlotConfig, config: CompileConfig
) -> CompileJob:
    try:
        seed = seed_alone(name, features, family=family, config=slot)
        return CompileJob.of(seed, features, seed_options(mode=config.mode))
    except BlueprintError as error:
        raise typer.BadParameter(
            f"--blueprint {name}: {error}; if it is your own, --import the module that registers it"
        ) from error
    except (JobError, TypeError, ValueError) as error:
        raise typer.BadParameter(f"--blueprint {name}: {error}") from error


def _compile_all(
    jobs: Sequence[CompileJob],
    store: ArtefactStore,
    config: CompileConfig,
    console: Console | None,
) -> list[_Row]:
    """Compile one after another, tell which on the console if there is one, and keep them."""
    rows = []
    with (
        bad_parameter(CacheFolderError),
        CompileService(store, limit_seconds=config.limit_seconds) as service,
    ):
        for job in jobs:
            if console is not None:
                console.print(f"compiling {job.request.living} …", style="dim")
            rows.append(_compile(service, job))
    return rows


def _compile(service: CompileService, job: CompileJob) -> _Row:
    answer = service.wait(job)
    name = job.request.living
    shape = _shape(job.request.features)
    if answer.artefact is None:
        return _Row(blueprint=name, features=shape, outcome="failed", error=answer.error)
    return _row(answer.artefact, "was there" if answer.source == "store" else "compiled")


def _kept(store: ArtefactStore) -> Iterator[_Row]:
    try:
        names = list(store.names())
    except OSError as error:
        raise typer.BadParameter(f"--store {store.url} cannot be read: {error}") from error
    for name in names:
        try:
            yield _row(store.describe(name), "was there")
        except (ArtefactError, OSError) as error:
            yield _Row(blueprint="?", features=name[:12], outcome="refused", error=str(error))


def _row(artefact: Artefact, outcome: Literal["compiled", "was there"]) -> _Row:
    return _Row(
        blueprint=" + ".join(artefact.request.blueprints),
        features=_shape(artefact.request.features),
        outcome=outcome,
        cold_ms=artefact.cold_ms,
        warm_ms=artefact.warm_ms,
        num_bytes=artefact.num_bytes,
    )


def _shape(features: FeatureGuards) -> str:
    return f"{'×'.join(map(str, features.shape))} {features.dtype} {features.device}"


def _print(console: Console, rows: list[_Row], store: ArtefactStore) -> None:
    if not rows:
        console.print(f"nothing is kept in {store.url}", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("blueprint", style="bold")
    table.add_column("features")
    for name in ("cold", "warm", "size"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    for row in rows:
        cells = ["", "", ""]
        if row.cold_ms is not None and row.warm_ms is not None and row.num_bytes is not None:
            cells = [
                f"{1e-3 * row.cold_ms:.1f} s",
                f"{1e-3 * row.warm_ms:.2f} s",
                f"{row.num_bytes / 1024:,.0f} KiB",
            ]
        told = row.outcome if row.error is None else f"{row.outcome}: {row.error}"
        style = "red" if row.error is not None else ""
        table.add_row(row.blueprint, row.features, *cells, Text(told, style))
    console.print(table)
    console.print(f"kept in {store.url}", style="dim", soft_wrap=True)
