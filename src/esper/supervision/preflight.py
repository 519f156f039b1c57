"""What is looked at before anything is started, so that all that is wrong is told at once."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from esper.signing import KeyFileError, Keyring
from esper.supervision.bus_servers import LOOPBACK, servers_found
from esper.supervision.children import CHECK
from esper.supervision.config import BusConfig, DashboardConfig, JobConfig, ServeConfig
from esper.supervision.finding import Finding, failure, ok, warning
from esper.supervision.program import job_arguments

_MIN_FREE_BYTES = 1 << 30
_JOB_SECONDS = 300.0
_DASHBOARD_PACKAGES = ("plotly", "starlette", "uvicorn")


def preflight(config: ServeConfig, base: Path, *, already_served: bool = False) -> list[Finding]:
    """Return what was found, in the order in which a person would look.

    Args:
        config: What is to be served.
        base: Folder of its file.
        already_served: Whether a supervisor serves it now, whose ports are taken.

    Effects: the user's own key file is made if it is needed and not there. A process is started for
    each job, which loads its settings and tries its device.
    """
    findings = [ok("config", _summary(config))]
    findings += _programs(config, base)
    findings += _keys(config.bus)
    findings += servers_found(config)
    findings += _disk(config)
    if already_served:
        findings.append(ok("ports", "not tried: it is served now"))
    else:
        findings += _ports(config)
    return [*findings, *_jobs(config)]


def _summary(config: ServeConfig) -> str:
    parts = [f"service {service.name}" for service in config.service]
    parts += [
        name for name, part in (("router", config.router), ("dashboard", config.dashboard)) if part
    ]
    return ", ".join([*parts, *(f"job {job.name}" for job in config.job)])


def _programs(config: ServeConfig, base: Path) -> Iterator[Finding]:
    for service in config.service:
        program, about = service.command[0], f"service {service.name}"
        found = shutil.which(str(base / program) if os.sep in program else program)
        if found is None:
            yield failure(
                about,
                f"there is no program {program!r}; install it, or give its whole path",
            )
        else:
            yield ok(about, found)
    if config.dashboard is not None:
        yield from _dashboard(config.dashboard)


def _dashboard(config: DashboardConfig) -> Iterator[Finding]:
    missing = [name for name in _DASHBOARD_PACKAGES if find_spec(name) is None]
    if missing:
        yield failure(
            "dashboard",
            f"it needs {', '.join(missing)}: pip install 'esper-lite[dashboard]'",
        )
        return
    from esper.dashboard import TokenError, find_token  # noqa: PLC0415 – an optional extra

    try:
        token = find_token(config.token_file)
    except (TokenError, OSError) as error:
        yield failure("dashboard", str(error))
        return
    if token is None and config.host not in LOOPBACK:
        yield warning(
            "dashboard",
            f"{config.host} is not of this machine alone and there is no token_file: a token "
            "is made at each start, and printed into its log",
        )


def _keys(bus: BusConfig | None) -> Iterator[Finding]:
    if bus is None:
        return
    try:
        ring = Keyring.of_user() if bus.key_file is None else Keyring.from_file(bus.key_file)
    except KeyFileError as error:
        yield failure("keys", str(error))
    else:
        place = bus.key_file or "the user's own keyring"
        yield ok("keys", f"{place}, keys: {len(ring.keys)}")


def _disk(config: ServeConfig) -> Iterator[Finding]:
    folders = {"folder": config.folder}
    if config.router is not None:
        folders["router"] = config.router.folder
    folders |= {f"job {job.name}": job.folder for job in config.job}
    seen = set()
    for about, folder in folders.items():
        try:
            place = next(path for path in (folder, *folder.parents) if path.exists())
            with tempfile.TemporaryFile(dir=place):
                pass
            device, free = place.stat().st_dev, shutil.disk_usage(place).free
        except OSError as error:
            yield failure(about, f"{folder} cannot be written: {error.strerror}")
            continue
        if device in seen:
            continue
        seen.add(device)
        text = f"{free / 1e9:.1f} GB free at {place}"
        if free < _MIN_FREE_BYTES:
            yield warning("disk", f"{text}; runs and logs may fill it")
        else:
            yield ok("disk", text)


def _ports(config: ServeConfig) -> Iterator[Finding]:
    places = {
        f"service {service.name}": (service.ready.host, service.ready.port)
        for service in config.service
        if service.ready is not None
    }
    if config.dashboard is not None:
        places["dashboard"] = (config.dashboard.host, config.dashboard.port)
    for about, (host, port) in places.items():
        problem = _port_problem(host, port)
        if problem is None:
            yield ok(about, f"port {port} is free")
        else:
            yield failure(about, f"port {port} of {host}: {problem}")


def _port_problem(host: str, port: int) -> str | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as error:
        return f"{error.strerror or error}; end what has it, or choose another"
    return None


def _jobs(config: ServeConfig) -> Iterable[Finding]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: _job(job, config.bus), config.job)


def _job(job: JobConfig, bus: BusConfig | None) -> Finding:
    """Let a process of its own load the settings of a job and try its device."""
    command = [sys.executable, "-m", "esper.supervision.children", CHECK]
    about = f"job {job.name}"
    try:
        done = subprocess.run(  # noqa: S603 – of the user's own file
            [*command, *job_arguments(job, bus)],
            capture_output=True,
            check=True,
            timeout=_JOB_SECONDS,
        )
        told = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        text = f"it cannot be looked at: {' '.join(last)}"
        return failure(about, text)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return failure(about, f"it cannot be looked at: {error}")
    if told["problem"] is not None:
        return failure(about, told["problem"])
    text = f"{job.task} on {told['device']}, into {job.folder}"
    return ok(about, text)
