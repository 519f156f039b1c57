"""`esper doctor`: is this machine ready?"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import distributed as dist
from torch import nn

from esper.slots.attach import attach, detach
from esper.tasks.collection import SCHEMES
from esper.tasks.named import TASKS
from esper.telemetry.environment import describe_device, describe_environment
from esper.training.sealed_folder import check_sealed, sealed_folder
from esper.training.state_tree import read_tree, write_tree

_MIN_FREE_BYTES = 1 << 30
EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": ("sklearn", "datasets", "PIL"),
        "report": ("matplotlib", "plotly"),
        "dashboard": ("plotly", "starlette", "uvicorn"),
        "tensorboard": ("tensorboard",),
        "wandb": ("wandb",),
        "mlflow": ("mlflow",),
        "prometheus": ("prometheus_client",),
        "tracking": ("tensorboard", "wandb", "mlflow", "prometheus_client"),
        "hf": ("transformers", "accelerate"),
        "lightning": ("lightning",),
        "redis": ("redis", "hiredis"),
        "serve": ("anyio", "redis", "hiredis"),
        "rl": ("gymnasium", "stable_baselines3", "sb3_contrib"),
        "ray": ("ray", "gymnasium", "stable_baselines3", "sb3_contrib"),
    }
)
"""Modules that each extra brings, those of the extras that it includes among them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


def doctor() -> None:
    """Check Python, torch, the compiler, extras and disk, and grow a seed once."""
    console = Console()
    findings = [finding for check in _CHECKS for finding in check()]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("--", "red" if finding.needed else "dim")
        table.add_row(mark, Text(finding.name), Text(finding.detail))
    console.print(table)
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


def _python() -> Iterator[Finding]:
    version = sys.version.split()[0]
    yield Finding("python", sys.version_info >= (3, 11), f"{version}, 3.11 or newer is needed")
    environment = describe_environment(_device())
    packages = environment["packages"]
    for name in ("torch", "pydantic", "safetensors"):
        yield Finding(name, packages[name] is not None, str(packages[name]))


def _device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _machine() -> Iterator[Finding]:
    machine = f"{describe_device(_device())}, {os.cpu_count()} CPU cores"
    yield Finding("device", ok=True, detail=machine)
    compiler = shutil.which("g++") or shutil.which("c++")
    detail = compiler or "none: torch.compile on the CPU needs g++; growing does not"
    yield Finding("C++ compiler", compiler is not None, detail, needed=False)
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", free >= _MIN_FREE_BYTES, f"{free / 1e9:.1f} GB free here")
    with tempfile.TemporaryDirectory() as folder:
        yield Finding("folder", os.access(folder, os.W_OK), "temporary folder is writable")


def _keeping() -> Iterator[Finding]:
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            sealed = Path(folder) / "sealed"
            with sealed_folder(sealed) as writing:
                write_tree({"weights": torch.ones(2)}, writing, "state")
            check_sealed(sealed)
            same = torch.equal(read_tree(sealed, "state")["weights"], torch.ones(2))
        detail = "one was written here, verified and read back"
    except OSError as error:
        same, detail = False, f"none can be written here: {error}"
    yield Finding("checkpoints", same, detail)
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]
    several = dist.is_available() and bool(backends)
    detail = ", ".join(backends) if several else "none: one process can train a model, not several"
    yield Finding("several processes", several, detail, needed=False)


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        installed = ", ".join(modules)
        how = f"lacks {', '.join(missing)}: pip install 'esper-lite[{extra}]'"
        yield Finding(f"extra [{extra}]", not missing, how if missing else installed, needed=False)
    for task in TASKS.values():
        yield Finding(f"task {task.name}", ok=True, detail=task.summary)
    for scheme, summary in SCHEMES.items():
        yield Finding(f"task {scheme}", ok=True, detail=summary)


def _growth() -> Iterator[Finding]:
    host = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    before = {name: value.clone() for name, value in host.state_dict().items()}
    slots = attach(host, ["0"], example=torch.zeros(2, 4))
    slots["0"].germinate("mlp")
    detach(host)
    same = all(torch.equal(before[name], value) for name, value in host.state_dict().items())
    yield Finding("growth", same, "a seed was built, pruned, and left no trace")


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _machine,
    _keeping,
    _extras,
    _growth,
)
