"""Boots programs in their order, keeps them running, and ends them in the reverse order."""

import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from esper.supervision import warden
from esper.supervision.bus_servers import own_servers_found
from esper.supervision.changes import Changes
from esper.supervision.child import marks_of
from esper.supervision.config import ServeConfig, ServeConfigError, load_serve_config
from esper.supervision.finding import Finding
from esper.supervision.health_teller import HealthTeller
from esper.supervision.notice import SERVE, Notice
from esper.supervision.program import Program, RunState, programs, state_of
from esper.supervision.service import Service
from esper.supervision.status import (
    Kind,
    ReloadStatus,
    ServeStatus,
    ServiceState,
    write_status,
)
from esper.telemetry.run_folder import RunFolderError

_DRAIN_ORDER: tuple[Kind, ...] = ("job", "router", "dashboard", "service")
"""The router outlives the jobs, so that their last words are routed."""
_STATUS_SECONDS = 1.0
_LEFT_BEHIND_SECONDS = 0.05
"""Between two looks at what an earlier supervisor has left."""

_BY_FOLDER = "with the settings of its folder, as only a new run takes others"


class Supervisor:
    """Runs what a file says until it is asked to end.

    Args:
        file: Is read again by `reload`.
        config: What it says now.
        preflight: What was found before; kept in the status.
        tell: Is called with everything that a person may want to see; everything waits for it.
    """

    def __init__(
        self,
        file: Path,
        config: ServeConfig,
        *,
        preflight: Sequence[Finding] = (),
        tell: Callable[[Notice], None],
    ) -> None:
        self._file = file.absolute()
        self._config = config
        self._preflight = tuple(preflight)
        self._tell = tell
        self._changes = Changes(self._service_changed)
        self._services: dict[str, Service] = {}
        """By name, in the order in which they start."""
        self._told: dict[str, tuple[ServiceState, str | None]] = {}
        self._reload: ReloadStatus | None = None
        self._reloading = anyio.Lock()
        self._health = HealthTeller.of(config.bus, config.folder)
        self._ending = anyio.Event()
        self._dirty = anyio.Event()
        self._status_problem: str | None = None

    def status(self) -> ServeStatus:
        """Return how everything stands."""
        return ServeStatus(
            time_seconds=time.time(),
            pid=os.getpid(),
            host=socket.gethostname(),
            config=str(self._file),
            ending=self._ending.is_set(),
            services=tuple(service.status() for service in self._services.values()),
            preflight=self._preflight,
            reload=self._reload,
            bus=None if self._health is None else self._health.condition,
        )

    async def run(self) -> None:
        """Run everything until `end` is called and all of it has ended."""
        async with anyio.create_task_group() as running:
            self._running = running
            running.start_soon(self._keep_status)
            running.start_soon(self._look_at_own_servers)
            self._start(programs(self._config, self._file.parent))
            await self._ending.wait()
            self._tell(Notice(about=SERVE, text="ends: jobs first, then what they need"))
            await self._stop(list(self._services.values()))
            running.cancel_scope.cancel()
        await self._write_status()
        if self._health is not None:
            await anyio.to_thread.run_sync(self._health.close)
        self._tell(Notice(about=SERVE, text="ended"))

    def end(self) -> None:
        """Let everything end; called again, at once."""
        if self._ending.is_set():
            for service in self._services.values():
                service.kill()
        self._ending.set()

    async def reload(self) -> None:
        """Read the file again; start what is new, end what is gone, restart what has changed.

        A job whose run has begun goes on with the settings that it began with, and that is told.
        What was given up is started again too. A file that is wrong changes nothing, and is told.
        """
        async with self._reloading:
            try:
                config = await anyio.to_thread.run_sync(load_serve_config, self._file)
                self._check_change(config)
                health = self._health
                if config.bus != self._config.bus:
                    health = HealthTeller.of(config.bus, config.folder)
            except (ValueError, ModuleNotFoundError) as error:
                self._note_reload(f"{error}; all goes on as before", done=False)
                return
            if health is not self._health and self._health is not None:
                await anyio.to_thread.run_sync(self._health.close)
            self._config, self._health = config, health
            self._note_reload(await self._change_to(config), done=True)

    def _check_change(self, config: ServeConfig) -> None:
        if config.folder != self._config.folder:
            raise ServeConfigError(
                f"folder cannot change while it is served, from {self._config.folder} to "
                f"{config.folder}; end esper serve first"
            )

    async def _change_to(self, config: ServeConfig) -> str:
        """End, restart and start what a config asks for, and return what that was."""
        wanted = programs(config, self._file.parent)
        begun = await anyio.to_thread.run_sync(_begun, wanted)
        same = {
            program.name: self._services[program.name]
            for program in wanted
            if program.name in self._services and self._goes_on(program, begun)
        }
        by_folder = {
            program.name
            for program in wanted
            if program.name in begun & set(self._services)
            and program.command != self._services[program.name].program.command
        }
        before = set(self._services)
        await self._stop([s for name, s in self._services.items() if name not in same])
        if self._ending.is_set():
            return "nothing was started, as esper serve ends"
        self._services = same
        for program in wanted:
            if program.name in same:
                restart, drain_seconds = config.restart, config.stop.drain_seconds
                same[program.name].configure(program, restart, drain_seconds)
        self._start(wanted)
        self._changes.wake()  # what waited for one that is gone need not any more
        names = {program.name for program in wanted}
        parts = (
            ("started", names - before),
            ("restarted", (names & before) - set(same)),
            ("ended", before - names),
            ("as before", set(same)),
            (_BY_FOLDER, by_folder),
        )
        return "; ".join(f"{word}: {', '.join(sorted(some))}" for word, some in parts if some)

    def _goes_on(self, program: Program, begun: Collection[str]) -> bool:
        """Return whether what runs of a program needs no restart to be as it is wanted now."""
        service = self._services[program.name]
        if service.state == ServiceState.GIVEN_UP:
            return False
        only_settings = service.program.differs_only_in_settings(program)
        return service.program == program or (only_settings and program.name in begun)

    def _start(self, wanted: Sequence[Program]) -> None:
        """Start what is not there yet."""
        config, known = self._config, self._services
        self._services = {
            program.name: known.get(program.name)
            or Service(
                program,
                folder=config.folder,
                restart=config.restart,
                drain_seconds=config.stop.drain_seconds,
                blocker=partial(self._blocker, program),
                changes=self._changes,
            )
            for program in wanted
        }
        for name, service in self._services.items():
            if name not in known:
                self._running.start_soon(service.run)

    async def _look_at_own_servers(self) -> None:
        """Look at the servers of the bus that are among the services, once they are ready."""
        while any(  # looked up anew, as the file may be read again meanwhile
            service.state != ServiceState.READY
            for service in self._services.values()
            if service.program.kind == "service"
        ):
            await self._changes.next()
        for finding in await anyio.to_thread.run_sync(own_servers_found, self._config):
            self._preflight += (finding,)
            if finding.level != "ok":
                self._tell(Notice(about=finding.about, text=f"{finding.level}: {finding.text}"))

    async def _stop(self, services: Sequence[Service]) -> None:
        """End programs in their order, those of one kind at once; services one after another."""
        for kind in _DRAIN_ORDER:
            some = [service for service in services if service.program.kind == kind]
            if kind == "service":
                for service in reversed(some):
                    await service.stop()
                continue
            async with anyio.create_task_group() as stopping:
                for service in some:
                    stopping.start_soon(service.stop)

    def _blocker(self, program: Program) -> str | None:
        """Return what a program has to wait for; None if it may start."""
        for name, other in self._services.items():
            if name == program.name:
                return None
            if other.program.kind == "service":
                if other.state != ServiceState.READY:
                    return f"needs {name}"
            elif program.kind == "job" and other.program.kind != "job" and not other.settled:
                return f"comes after {name}"
        return None

    def _service_changed(self, name: str) -> None:
        self._dirty.set()
        service = self._services[name].status()
        waits = service.state == ServiceState.WAITING
        told = (service.state, None if waits else service.reason)
        if self._told.get(name) == told:
            return
        self._told[name] = told
        bad = service.state in (ServiceState.GIVEN_UP, ServiceState.BACKING_OFF)
        text = service.reason
        if service.next_start_seconds is not None:
            wait = max(0.0, service.next_start_seconds - time.time())
            text = f"{text}; starts again in {wait:.1f} s"
        lines = service.last_lines if bad else ()
        self._tell(Notice(about=name, state=service.state, text=text, lines=lines))

    def _note_reload(self, text: str, *, done: bool) -> None:
        self._reload = ReloadStatus(time_seconds=time.time(), done=done, text=text)
        self._dirty.set()
        told = f"read {self._file} again" if done else "the file was not taken"
        self._tell(Notice(about=SERVE, text=f"{told}: {text}"))

    async def _keep_status(self) -> None:
        """Write the status whenever something changes, and every second."""
        while True:
            with anyio.move_on_after(_STATUS_SECONDS):
                await self._dirty.wait()
            self._dirty = anyio.Event()
            await self._write_status()

    async def _write_status(self) -> None:
        status = self.status()
        if self._health is not None:
            self._health.tell(status.services)
        try:
            await anyio.to_thread.run_sync(write_status, status, self._config.folder)
        except OSError as error:
            if self._status_problem is None:
                self._tell(Notice(about=SERVE, text=f"the status cannot be written: {error}"))
            self._status_problem = str(error)
        else:
            self._status_problem = None


def _begun(wanted: Sequence[Program]) -> set[str]:
    """Return the jobs whose runs have begun: they go on as their folders say."""
    begun = set()
    for program in wanted:
        if program.run is not None:
            with suppress(RunFolderError, OSError):  # which is said when the job starts
                if state_of(program.run) != RunState.NEW:
                    begun.add(program.name)
    return begun


async def serve_until_signal(supervisor: Supervisor) -> None:
    """Run a supervisor; SIGTERM and SIGINT end it, a second one at once, SIGHUP reads its file."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with anyio.open_signal_receiver(*numbers) as signals:
        async with anyio.create_task_group() as serving:

            async def obey() -> None:
                async for number in signals:
                    if number == signal.SIGHUP:
                        serving.start_soon(supervisor.reload)
                    else:
                        supervisor.end()

            serving.start_soon(obey)
            await supervisor.run()
            serving.cancel_scope.cancel()


def end_left_behind(folder: Path, drain_seconds: float) -> int:
    """Wait for what an earlier supervisor of a folder has left, and kill it in the end.

    Its wardens are ending it. The caller holds the folder's lock.

    Returns:
        How many processes there were.
    """
    marks = marks_of(folder)
    found = len(warden.marked_processes(marks))
    until = time.monotonic() + drain_seconds
    while warden.marked_processes(marks) and time.monotonic() < until:
        time.sleep(_LEFT_BEHIND_SECONDS)
    warden.kill_marked(marks)
    return found
