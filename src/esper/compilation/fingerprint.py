"""What machine code that the compiler makes is made for."""

import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from esper.lifecycle.record import Record

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FIELDS = ("model name", "flags", "Features", "CPU part")
"""Of x86 and of ARM; code is generated for this very processor."""


class Fingerprint(Record):
    """Equal fingerprints run each other's machine code."""

    esper: str | None
    """Its version; None where it is not installed."""
    torch: str
    python: str
    machine: str
    cpu: str
    """Digest of the processor's model and instructions."""
    compiler: str | None
    """First line of the C++ compiler's version; None without one."""
    gpu: str | None
    """Name and compute capability, with the version of CUDA; None where torch sees none."""

    @classmethod
    def here(cls) -> "Fingerprint":
        """Return this machine's, as this process sees it."""
        return _here()

    @property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def differences(self, other: "Fingerprint") -> str:
        """Return what differs, for people: `torch is 2.13.0, was 2.12.0`."""
        mine, theirs = self.model_dump(), other.model_dump()
        return ", ".join(
            f"{name} is {value}, was {theirs[name]}"
            for name, value in mine.items()
            if value != theirs[name]
        )


@cache
def _here() -> Fingerprint:
    return Fingerprint(
        esper=_esper(),
        torch=f"{torch.__version__} {torch.version.git_version}",
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
        cpu=_cpu(),
        compiler=_compiler(),
        gpu=_gpu(),
    )


def _esper() -> str | None:
    try:
        return version("esper-lite")
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else [platform.processor()]
    known = sorted({line for line in lines if line.partition(":")[0].strip() in _CPU_FIELDS})
    text = "\n".join([*known, torch.backends.cpu.get_cpu_capability()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compiler() -> str | None:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        return None
    told = subprocess.run(  # noqa: S603 – the compiler that torch will run
        [path, "--version"], capture_output=True, text=True, check=False
    )
    return told.stdout.partition("\n")[0] or None


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor} CUDA {torch.version.cuda}"
