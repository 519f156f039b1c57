"""One program that is kept running: started in its turn, watched, and brought back."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from esper.supervision.changes import Changes
from esper.supervision.child import Child, Ending
from esper.supervision.config import RestartConfig
from esper.supervision.log_tail import last_lines
from esper.supervision.program import Program, RunState, clear_half_made, state_of
from esper.supervision.restart_policy import RestartPolicy
from esper.supervision.status import BeatStatus, ServiceState, ServiceStatus
from esper.telemetry.run_folder import RunFolderError

_LOOK_SECONDS = 0.05
"""Between two tries of a port."""
_BUSY_SECONDS = 1.0
"""Between two looks at a run that another process writes."""
_GOES_ON = "with resume_stopped it goes on when esper serve starts the next time"
_ENDED_RIGHT = frozenset({ServiceState.FINISHED, ServiceState.STOPPED})
_SETTLED = _ENDED_RIGHT | {ServiceState.READY, ServiceState.GIVEN_UP, ServiceState.BACKING_OFF}


class Service:
    """Keeps a program running until it has ended as it should, is given up, or is to stop.

    Args:
        program: To run.
        folder: Of the supervisor.
        restart: When it is started again.
        drain_seconds: How long it may take to end.
        blocker: Returns what the program has to wait for; None if nothing.
        changes: Is told of every change of its state, and awaited when it is blocked.
    """

    def __init__(
        self,
        program: Program,
        *,
        folder: Path,
        restart: RestartConfig,
        drain_seconds: float,
        blocker: Callable[[], str | None],
        changes: Changes,
    ) -> None:
        self.program = program
        self.state = ServiceState.WAITING
        self._reason: str | None = None
        self._since_seconds = time.time()
        self._folder = folder
        self._log = folder / "logs" / f"{program.name}.log"
        self._drain_seconds = drain_seconds
        self._policy = RestartPolicy(restart)
        self._blocker = blocker
        self._changes = changes
        self._child: Child | None = None
        self._beat: BeatStatus | None = None
        self._beat_seconds = 0.0
        self._ready_seconds = 0.0
        self._hangs: str | None = None
        self._restarts = 0
        self._last_exit: str | None = None
        self._last_lines: tuple[str, ...] = ()
        self._next_start_seconds: float | None = None
        self._scope = anyio.CancelScope()
        self._over = anyio.Event()

    @property
    def settled(self) -> bool:
        """Whether it need not be waited for: it was ready, or that may take long."""
        return self.state in _SETTLED or self._restarts > 0

    def status(self) -> ServiceStatus:
        """Return how it stands."""
        beat = None if self._child is None else self._beat
        if beat is not None:
            beat = beat.model_copy(update={"age_seconds": time.monotonic() - self._beat_seconds})
        return ServiceStatus(
            name=self.program.name,
            kind=self.program.kind,
            state=self.state,
            reason=self._reason_with_log,
            pid=None if self._child is None else self._child.pid,
            since_seconds=self._since_seconds,
            restarts=self._restarts,
            beat=beat,
            silent_seconds=self.program.silent_seconds,
            last_exit=self._last_exit,
            last_lines=self._last_lines,
            next_start_seconds=self._next_start_seconds,
            log=str(self._log),
        )

    @property
    def _reason_with_log(self) -> str | None:
        problem = None if self._child is None else self._child.log_problem
        return "; ".join(filter(None, (self._reason, problem))) or None

    async def run(self) -> None:
        """Keep it running. It can be cancelled: the program is asked to end then, in its time."""
        try:
            with self._scope:
                while (wait := await self._run_once()) is not None:
                    self._next_start_seconds = time.time() + wait
                    self._enter(ServiceState.BACKING_OFF, self._reason)
                    await anyio.sleep(wait)
                    self._next_start_seconds = None
                    self._restarts += 1
            if self.state not in {*_ENDED_RIGHT, ServiceState.GIVEN_UP}:
                self._next_start_seconds = None
                self._enter(ServiceState.STOPPED, "ended with esper serve")
        finally:
            self._over.set()

    async def stop(self) -> None:
        """Ask it to end, and wait until nothing of it is left."""
        self._scope.cancel()
        await self._over.wait()

    def configure(self, program: Program, restart: RestartConfig, drain_seconds: float) -> None:
        """Take what a file that was read again says; it holds from the next start or death on.

        Args:
            program: The same, but for how its run would begin.
            restart: When it is started again.
            drain_seconds: How long it may take to end.
        """
        self.program = program
        self._policy.configure(restart)
        self._drain_seconds = drain_seconds

    def kill(self) -> None:
        """Let it end at once."""
        if self._child is not None:
            self._child.kill()

    async def _run_once(self) -> float | None:
        """Start the program and wait for its end.

        Returns:
            Seconds to wait before it is started again; None if it is not.
        """
        while (blocker := self._blocker()) is not None:
            self._enter(ServiceState.WAITING, blocker)
            await self._changes.next()
        try:
            command = await self._command()
        except (RunFolderError, OSError) as error:
            return self._died(str(error))
        if command is None:
            return None
        self._enter(ServiceState.STARTING, None)
        try:
            self._child = self._new_child(command)
        except OSError as error:
            return self._died(f"it cannot be started: {error}")
        try:
            ending = await self._watch(self._child)
        finally:
            self._child.close()
            self._child = None
        return await self._ended(ending)

    async def _command(self) -> tuple[str, ...] | None:
        """Return what to start; None if there is nothing left to do."""
        run = self.program.run
        if run is None:
            return self.program.command
        while (state := await anyio.to_thread.run_sync(state_of, run)) == RunState.BUSY:
            self._enter(ServiceState.WAITING, f"another process writes {run.folder}")
            await anyio.sleep(_BUSY_SECONDS)
        if state == RunState.FINISHED:
            self._enter(ServiceState.FINISHED, None)
            return None
        if state == RunState.STOPPED:
            self._enter(ServiceState.STOPPED, f"by a command; {_GOES_ON}")
            return None
        if state != RunState.NEW:
            return run.resume
        if await anyio.to_thread.run_sync(clear_half_made, run.folder):
            removed = f"removed what a process had only begun to make in {run.folder}"
            self._enter(ServiceState.STARTING, removed)
        return self.program.command

    def _new_child(self, command: tuple[str, ...]) -> Child:
        self._hangs = None
        self._beat = None
        self._beat_seconds = time.monotonic()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        return Child(
            self.program.name,
            command,
            working=self.program.folder,
            folder=self._folder,
            log=self._log,
            drain_seconds=self._drain_seconds,
            changed=partial(self._changes.tell, self.program.name),
        )

    async def _watch(self, child: Child) -> Ending:
        """Wait for the end of a program, which is made to end if it hangs or is to stop."""
        try:
            async with anyio.create_task_group() as watching:
                watching.start_soon(self._take_beats, child)
                watching.start_soon(self._await_readiness, child)
                if self.program.silent_seconds is not None:
                    watching.start_soon(self._watch_silence, child, self.program.silent_seconds)
                ending = await child.ended()
                watching.cancel_scope.cancel()
        except anyio.get_cancelled_exc_class():
            self._enter(ServiceState.STOPPING, None)
            self._last_exit = str(await child.ended_by_order())
            raise
        return ending

    async def _take_beats(self, child: Child) -> None:
        while (beats := await child.beats.next()) is not None:
            self._note(beats)

    def _note(self, beats: list[Any]) -> None:
        for beat in beats:
            try:
                told = BeatStatus.model_validate({**beat, "age_seconds": 0.0})
                told.model_dump_json()  # half a surrogate pair could not be sent on
            except (TypeError, ValueError):
                self._reason = f"what it sent is no heartbeat: {beat!r:.100}"
                continue
            changed = self._beat is None or self._beat.state != told.state
            self._beat, self._beat_seconds = told, time.monotonic()
            if self.state == ServiceState.STARTING and self._ready_by_beat:
                self._become_ready()
            elif changed:
                self._changes.tell(self.program.name)

    @property
    def _ready_by_beat(self) -> bool:
        return self.program.ready_place is None and self.program.silent_seconds is not None

    async def _await_readiness(self, child: Child) -> None:
        """See that the program becomes ready in its time."""
        await child.running.wait()
        self._changes.tell(self.program.name)
        with anyio.move_on_after(self.program.ready_seconds):
            if self.program.ready_place is not None:
                await self._until_answered()
                self._become_ready()
            elif not self._ready_by_beat:
                self._become_ready()
            else:
                await anyio.sleep_forever()
        if self.state == ServiceState.STARTING:
            self._kill_as(child, f"not ready after {self.program.ready_seconds:g} s")

    async def _until_answered(self) -> None:
        place = self.program.ready_place
        assert place is not None
        host = place.host.encode("idna").decode()  # as it was checked: anyio takes fewer names
        while True:
            try:
                stream = await anyio.connect_tcp(host, place.port)
            except OSError:
                await anyio.sleep(_LOOK_SECONDS)
            else:
                await stream.aclose()
                return

    def _become_ready(self) -> None:
        self._policy.became_ready()
        self._ready_seconds = time.monotonic()
        self._enter(ServiceState.READY, None)

    async def _watch_silence(self, child: Child, silent_seconds: float) -> None:
        while True:
            left = self._left(silent_seconds)
            if self.state != ServiceState.READY:
                left = silent_seconds
            elif left <= 0.0:
                self._note(child.beats.take())  # this process may itself have been held up
                if self._left(silent_seconds) <= 0.0:
                    self._kill_as(child, f"silent for {silent_seconds:g} s")
                    return
                continue
            await anyio.sleep(left)

    def _left(self, silent_seconds: float) -> float:
        """Return how long a program that is ready may stay silent yet."""
        return max(self._beat_seconds, self._ready_seconds) + silent_seconds - time.monotonic()

    def _kill_as(self, child: Child, problem: str) -> None:
        self._hangs = problem
        self._enter(ServiceState.STOPPING, problem)
        child.kill_hanging()

    async def _ended(self, ending: Ending) -> float | None:
        self._last_exit = str(ending)
        run = self.program.run
        if run is None or ending.code != 0:
            return self._died(self._hangs or f"ended with {ending}")
        try:
            state = await anyio.to_thread.run_sync(state_of, run)
        except (RunFolderError, OSError) as error:
            return self._died(str(error))
        if state == RunState.FINISHED:
            self._enter(ServiceState.FINISHED, None)
        else:
            self._enter(ServiceState.STOPPED, f"it was asked to end; {_GOES_ON}")
        return None

    def _died(self, problem: str) -> float | None:
        self._reason = problem
        try:
            self._last_lines = last_lines(self._log)
        except OSError as error:
            self._last_lines = (f"its log cannot be read: {error}",)
        wait = self._policy.died()
        if wait is None:
            times = self._policy.restarts
            self._enter(ServiceState.GIVEN_UP, f"{problem}; restarted {times} times in a row")
        return wait

    def _enter(self, state: ServiceState, reason: str | None) -> None:
        if (state, reason) == (self.state, self._reason) and state == ServiceState.WAITING:
            return
        if state != self.state:
            self._since_seconds = time.time()
        self.state, self._reason = state, reason
        self._changes.tell(self.program.name)
