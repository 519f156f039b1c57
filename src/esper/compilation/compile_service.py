"""Compiles ahead of need, in another process, and keeps what it has compiled."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self

from esper.compilation.artefact_store import Artefact, ArtefactError, ArtefactStore
from esper.compilation.compile_job import CompileJob, told
from esper.compilation.compile_request import CompileRequest
from esper.compilation.inductor_cache import inductor_folder, remove_leftovers, unpack
from esper.compilation.pipe import receive, send
from esper.compilation.worker import WorkDone, WorkOrder
from esper.lifecycle.events import ArtefactRefused, Event

_WORK = "from esper.compilation.worker import main; main()"
_CLOSING_SECONDS = 10.0
"""For what the thread is doing; a store that does not answer must not hold up a run's end."""
_CLOSED = "the compile service was closed"
_TOLD_LINES = 3
"""Of what a worker that died has said last."""


class CompileAnswer(NamedTuple):
    """How a request ended."""

    artefact: Artefact | None
    """Its files are in the compiler's folder; None if it could not be made."""
    source: Literal["store", "worker"]
    error: str | None


class CompileService:
    """Gets compiled graphs from an artefact store, or has a worker process make them.

    Everything happens in a thread and in the worker: asking returns at once, and the answer is
    there when it is there. The compiler's folder is then such that compiling the same in this
    process finds everything done.

    Args:
        store: Where artefacts are kept.
        limit_seconds: For one job; a worker that takes longer is killed.
        max_ahead: How many requests may wait that nobody needs yet.

    Raises:
        CacheFolderError: The compiler's folder in this process cannot be trusted.

    Effects: as `inductor_folder`.
    """

    def __init__(
        self, store: ArtefactStore, *, limit_seconds: float = 600.0, max_ahead: int = 4
    ) -> None:
        self._store = store
        self._limit_seconds = limit_seconds
        self._max_ahead = max_ahead
        self._folder = inductor_folder()
        self._condition = threading.Condition()
        self._jobs: OrderedDict[str, CompileJob] = OrderedDict()
        """Waiting, the most urgent first."""
        self._known: set[str] = set()
        """Requests that were made, answered or not."""
        self._answers: dict[str, CompileAnswer] = {}
        self._events: list[Event] = []
        self._worker: _Worker | None = None
        self._closed = False
        self.version = 0
        """Rises with every answer and every event, and when it is closed."""
        self._thread = threading.Thread(target=self._serve, name="esper-compile", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pid(self) -> int | None:
        """The worker's process, which also leads its group; None if there is none."""
        with self._condition:
            return None if self._worker is None else self._worker.pid

    def ask(self, job: CompileJob, *, ahead: bool = False) -> bool:
        """Let a job be done; one that was asked for before is not done again, unless it failed.

        Args:
            job: What to compile.
            ahead: Nobody needs it yet: it comes after what is needed, if too many wait already, it
                is left out, and what has failed is not tried again.

        Returns:
            Whether it will be done, or was.
        """
        digest = job.request.digest
        with self._condition:
            if self._closed or (ahead and len(self._jobs) >= self._max_ahead):
                return digest in self._known
            answer = self._answers.get(digest)
            if not ahead and answer is not None and answer.error is not None:
                del self._answers[digest]
                self._known.remove(digest)
            if digest not in self._known:
                self._known.add(digest)
                self._jobs[digest] = job
            if not ahead and digest in self._jobs:
                self._jobs.move_to_end(digest, last=False)
            self._condition.notify_all()
        return True

    def answer(self, request: CompileRequest) -> CompileAnswer | None:
        """Return how a request ended; None while it has not, or was never made.

        What was not answered when the service was closed has failed.
        """
        closed = CompileAnswer(None, "worker", _CLOSED) if self._closed else None
        return self._answers.get(request.digest, closed)

    def wait(self, job: CompileJob) -> CompileAnswer:
        """Let a job be done, and return how it ended; for those who have nothing else to do.

        Raises:
            RuntimeError: The service was closed.
        """
        self.ask(job)
        digest = job.request.digest
        with self._condition:
            while digest not in self._answers and not self._closed:
                self._condition.wait()
            if self._closed:
                raise RuntimeError(_CLOSED)
            return self._answers[digest]

    def events(self) -> list[Event]:
        """Return what has happened since the last call: artefacts that were refused."""
        with self._condition:
            events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Stop the worker, whatever it does; nothing more is compiled, and seeds run as they are.

        A store that does not answer is waited for a few seconds, and then left to its thread.
        """
        with self._condition:
            self._closed = True
            self.version += 1  # whoever waits hears it
            self._jobs.clear()
            if self._worker is not None:
                self._worker.kill()
            self._condition.notify_all()
        self._thread.join(_CLOSING_SECONDS)
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _serve(self) -> None:
        # What fails here fails when something is asked for, too, and is told then.
        with contextlib.suppress(Exception):
            remove_leftovers(self._folder)
            self._store.remove_leftovers()
        while True:
            with self._condition:
                while not self._jobs and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                digest, job = self._jobs.popitem(last=False)
            self._settle(digest, self._do(job))
            del job

    def _settle(self, digest: str, answer: CompileAnswer) -> None:
        with self._condition:
            if self._closed:  # and the worker was killed, which says nothing about the job
                return
            self._answers[digest] = answer
            self.version += 1
            self._condition.notify_all()

    def _do(self, job: CompileJob) -> CompileAnswer:
        try:
            artefact = self._take(job.request)
            if artefact is not None:
                return CompileAnswer(artefact, "store", None)
            error = self._have_made(job)
            if error is None:
                artefact = self._take(job.request)
                error = "the artefact is not in the store" if artefact is None else None
        except Exception as problem:  # noqa: BLE001 – the store's, of whatever kind it is
            return CompileAnswer(None, "store", told(problem))
        return CompileAnswer(artefact, "worker", error)

    def _take(self, request: CompileRequest) -> Artefact | None:
        """Put what the store has for a request into the compiler's folder."""
        try:
            stored = self._store.load(request)
        except ArtefactError as error:
            self._tell(ArtefactRefused(blueprint=request.living, reason=str(error)))
            return None
        if stored is None:
            return None
        unpack(stored.files, self._folder)
        return stored.artefact

    def _have_made(self, job: CompileJob) -> str | None:
        with self._condition:
            if self._closed:
                return _CLOSED
            if self._worker is not None and self._worker.ended:
                self._worker.close()
                self._worker = None
            if self._worker is None:
                self._worker = _Worker()
            worker = self._worker
        # A worker that is killed leaves its files, so the folder is not its own.
        with tempfile.TemporaryDirectory(dir=worker.folder) as folder:
            order = WorkOrder(job, self._store.url, self._store.keyring.keys, folder)
            try:
                return worker.do(order, self._limit_seconds).error
            except Exception as error:  # noqa: BLE001 – nobody knows what is in its pipes now
                worker.kill()
                with self._condition:
                    self._worker = None
                worker.close()
                return str(error) if isinstance(error, WorkerError) else told(error)

    def _tell(self, event: Event) -> None:
        with self._condition:
            self._events.append(event)
            self.version += 1


class WorkerError(RuntimeError):
    """The worker did not answer, and cannot be used any more."""


class _Worker:
    """A worker process and the pipes to it, in a process group of its own."""

    def __init__(self) -> None:
        self._told: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 – as long as the process
        self._folder = tempfile.TemporaryDirectory(prefix="esper-compiling-")
        answers, answering = os.pipe()
        self._answers = os.fdopen(answers, "rb")
        try:
            self._process = subprocess.Popen(  # noqa: S603 – this very interpreter
                [sys.executable, "-P", "-c", _WORK, str(answering), self.folder, *sys.path],
                stdin=subprocess.PIPE,
                stdout=self._told,  # whatever prints, at import or later, answers nothing
                stderr=self._told,
                pass_fds=[answering],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_path_to_start_with())},
                start_new_session=True,
            )
        finally:
            os.close(answering)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def folder(self) -> str:
        """Where those of its orders are; the worker removes it if this process is killed."""
        return self._folder.name

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def do(self, order: WorkOrder, limit_seconds: float) -> WorkDone:
        """Hand over one job, and wait for its end.

        Raises:
            WorkerError: It took longer than the limit, so that the worker was ended, or it died.
        """
        process = self._process
        assert process.stdin is not None
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            self.kill()

        # Not a limit for reading alone: a worker that does not read holds up a large order, too.
        timer = threading.Timer(limit_seconds, end)
        timer.start()
        try:
            send(process.stdin, order)
            done: WorkDone = receive(self._answers.read)
        except (EOFError, OSError) as error:
            process.wait()
            if overdue.is_set():
                raise WorkerError(
                    f"compiling took longer than {limit_seconds:g} s and was stopped"
                ) from error
            status = process.returncode
            raise WorkerError(
                f"the compiling process ended with status {status}: {self._last_words()}"
            ) from error
        finally:
            timer.cancel()
        return done

    def kill(self) -> None:
        """End it at once, and a compiler that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Close the pipes of a worker that was killed, and remove what it has left."""
        with contextlib.suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)
        self._answers.close()
        self._told.close()
        self._folder.cleanup()

    def _last_words(self) -> str:
        self._told.seek(0)
        lines = self._told.read().decode(errors="replace").splitlines()
        return " | ".join(lines[-_TOLD_LINES:]) or "it said nothing"


def _path_to_start_with() -> list[str]:
    """Return where a worker finds this very package, and no file of the working directory instead.

    A `queue.py` there is none of Python's; here that was imported before the directory came first.
    """
    home, here = str(Path(__file__).parents[2]), str(Path.cwd())
    return [path for path in sys.path if str(Path(path).absolute()) != here or path == home]
