"""Runs one program for a supervisor, and leaves nothing of it behind.

Started as a plain file, by `python -I -S warden.py OPTIONS -- COMMAND`: it imports nothing of
esper, which would load torch, so that it is small and starts at once.

It leads a process group, in which the program runs, and adopts whatever of the program loses its
parent. The supervisor holds the other end of its lifeline, a pipe: a byte in it is an order, and
its end means that the supervisor is gone, however it went. Either way the program is asked to end,
and what is left of it after a while is killed. Only the program itself is asked: what it has
started, as workers that load data, it has use for until its last checkpoint is written.
"""

import argparse
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

END = b"e"
"""Ask the program to end, and kill it if it does not in time."""
KILL = b"k"
"""Kill it now."""
DUMP = b"d"
"""Kill it as one that hangs: SIGABRT lets Python, among others, say first where it is."""

HEAD = b"=== esper serve: "
"""Begins the line that the warden writes into the log before the program starts."""

_DUMP_SECONDS = 2.0
_KILLING_SECONDS = 5.0
_KILLING_WAIT_SECONDS = 0.01
_LONGEST_WAIT_SECONDS = 3600.0
"""Then it looks again: no selector takes more than about 24 days."""
_READ_BYTES = 1 << 16
_PARENT_DIED = 1
_ADOPTS = 36
"""PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of <linux/prctl.h>."""


def marked_processes(marks: Collection[str]) -> list[int]:
    """Return the processes that were started with all these `NAME=VALUE` in their environment.

    Whatever group or session they are in now, unless they have written over their environment.
    Only on Linux, and only those of this user; else there are none.
    """
    wanted = {os.fsencode(mark) for mark in marks}
    return [
        pid
        for pid, environment in _told_of_processes("environ")
        if wanted <= set(environment.split(b"\0"))
    ]


def descendants_of(ancestors: Collection[int]) -> list[int]:
    """Return the living processes that others have started or adopted, parents first.

    Only on Linux; else there are none.
    """
    children: dict[int, list[int]] = {}
    dead = set()
    for pid, told in _told_of_processes("stat"):
        words = told.rpartition(b")")[2].split()  # a name in brackets holds anything
        state, parent, num_threads = words[0], int(words[1]), int(words[17])
        children.setdefault(parent, []).append(pid)
        if state in b"ZX" and num_threads <= 1:  # with more only its first thread has ended
            dead.add(pid)
    found = [*ancestors]
    for pid in found:  # which grows meanwhile
        found += children.pop(pid, [])
    return [pid for pid in found[len(ancestors) :] if pid not in dead]


def kill_marked(marks: Collection[str]) -> None:
    """Kill marked processes, and before them all that they have started or adopted.

    Before, as nobody knows any more what a warden has adopted once it is killed.
    """
    _kill_all(lambda: descendants_of(marked_processes(marks)))
    _kill_all(lambda: marked_processes(marks))


def _kill_all(find: Callable[[], Collection[int]]) -> None:
    """Kill processes until none is found, at most for some seconds."""
    until = time.monotonic() + _KILLING_SECONDS
    while (found := find()) and time.monotonic() < until:
        _kill(found)
        time.sleep(_KILLING_WAIT_SECONDS)


def _kill(processes: Collection[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _told_of_processes(name: str) -> Iterator[tuple[int, bytes]]:
    """Return what the file of a name in /proc tells of each process that may be looked at."""
    with suppress(FileNotFoundError):  # not Linux
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                with suppress(OSError):  # gone by now, or another user's
                    yield int(folder.name), (folder / name).read_bytes()


class BoundedLog:
    """A file that is appended to, and begun anew where it would grow too long; one old one is kept.

    Args:
        file: The old one has `.1` behind its name.
        max_bytes: Of each of both.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._stream = self._opened()

    def write(self, output: bytes) -> None:
        """Append to it.

        Raises:
            OSError: It cannot be written now.
        """
        if self._stream.tell() and self._stream.tell() + len(output) > self._max_bytes:
            with suppress(FileNotFoundError):  # put aside before, and no new one could be opened
                self._file.replace(self._file.with_name(f"{self._file.name}.1"))
            new = self._opened()
            self._stream.close()
            self._stream = new
        self._stream.write(output)

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def _opened(self) -> IO[bytes]:
        # Readable by its owner alone: a program may print a token.
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(descriptor, "ab", buffering=0)


class Warden:
    """Starts a program, passes its output on to a log, and ends it.

    Args:
        command: The program and its arguments.
        log: Takes what it prints.
        lifeline: Reading end of a pipe from the supervisor.
        report: Writing end of a pipe to it, for a line of JSON each: `{"started": PID}`,
            `{"ended": CODE}` below 0 for a signal, `{"failed": WHY}`, `{"log": WHY}` when
            what is printed is lost, and `{"log": null}` when it is not any more.
        beats: Passed on to the program.
        drain_seconds: How long a program may take that was asked to end.
    """

    def __init__(
        self,
        command: Collection[str],
        log: BoundedLog,
        *,
        lifeline: int,
        report: int,
        beats: int,
        drain_seconds: float,
    ) -> None:
        self._command = [*command]
        self._log = log
        self._lifeline = lifeline
        self._report = report
        self._beats = beats
        self._drain_seconds = drain_seconds
        self._until: float | None = None
        self._log_works = True

    def run(self) -> None:
        """Run the program to its end, and report it.

        Effects: ends by killing the whole group, this process included.
        """
        woken, waking = os.pipe()
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # not ignored: the program would inherit that
        _adopt_orphans()
        output, printing = os.pipe()
        shown = " ".join(" ".join(self._command).split())
        self._write_log(f"{_now()} {shown}\n".encode(errors="replace"), head=True)
        try:
            self._program = subprocess.Popen(  # noqa: S603 – of the supervisor's own file
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=printing,
                stderr=printing,
                pass_fds=[self._beats],
                preexec_fn=_dying_with(os.getpid()),  # noqa: PLW1509 – there is one thread here
            )
        except OSError as error:
            self._tell(failed=f"{self._command[0]} cannot be started: {error.strerror}")
            return
        self._tell(started=self._program.pid)
        os.close(printing)
        os.close(self._beats)
        self._watch(woken, output)
        self._kill_rest()
        os.set_blocking(output, False)
        with suppress(BlockingIOError):  # somebody who is not ours may hold the other end
            while printed := os.read(output, _READ_BYTES):
                self._write_log(printed)
        self._log.close()
        self._tell(ended=self._program.returncode)
        os.killpg(0, signal.SIGKILL)

    def _watch(self, woken: int, output: int) -> None:
        """Serve the pipes until the program has ended."""
        with selectors.DefaultSelector() as selector:
            for descriptor in (self._lifeline, woken, output):
                selector.register(descriptor, selectors.EVENT_READ)
            while self._reap() and self._program.returncode is None:
                if self._until is not None and time.monotonic() >= self._until:
                    self._program.kill()
                    self._program.wait()
                    return
                left = None
                if self._until is not None:
                    left = min(max(0.0, self._until - time.monotonic()), _LONGEST_WAIT_SECONDS)
                for key, _ in selector.select(left):
                    came = os.read(key.fd, _READ_BYTES)
                    if key.fd == output:
                        self._write_log(came)
                    elif key.fd == self._lifeline:
                        self._obey(came or END)
                    elif signal.SIGTERM in came:
                        self._obey(END)
                    if not came:
                        selector.unregister(key.fd)

    def _reap(self) -> bool:
        """Wait for what has ended, adopted or not; return whether there is anything left."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._program.pid:
                    self._program.returncode = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            return False
        return True

    def _kill_rest(self) -> None:
        """Kill what the program has left, whatever group, session or environment it is in.

        Once this process has no child left, nothing is: each had a parent here, or was adopted.
        """
        until = time.monotonic() + _KILLING_SECONDS
        while self._reap() and time.monotonic() < until:
            _kill(descendants_of([os.getpid()]))
            time.sleep(_KILLING_WAIT_SECONDS)

    def _obey(self, orders: bytes) -> None:
        for order in (orders[index : index + 1] for index in range(len(orders))):
            if order == KILL:
                self._end_within(0.0)
            elif order == DUMP:
                self._program.send_signal(signal.SIGABRT)
                self._end_within(_DUMP_SECONDS)
            elif order == END and self._until is None:
                self._program.send_signal(signal.SIGTERM)
                self._end_within(self._drain_seconds)

    def _end_within(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._until = until if self._until is None else min(self._until, until)

    def _write_log(self, output: bytes, *, head: bool = False) -> None:
        try:
            self._log.write(HEAD + output if head else output)
        except OSError as error:
            if self._log_works:
                self._tell(log=f"what it prints is lost: {error}")
            self._log_works = False
        else:
            if not self._log_works:
                self._tell(log=None)
            self._log_works = True

    def _tell(self, **fact: str | int | None) -> None:
        with suppress(BrokenPipeError):  # the supervisor is gone
            os.write(self._report, json.dumps(fact).encode() + b"\n")


def _adopt_orphans() -> None:
    """Become the parent of what this process's own leave behind, where that can be."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_ADOPTS, 1, 0, 0, 0)


def _dying_with(parent: int) -> Callable[[], None] | None:
    """Return what lets a new process be killed when its parent dies; None where that cannot be."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PARENT_DIED, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def main() -> None:
    """Run the program of the command line."""
    parser = argparse.ArgumentParser()
    for name in ("lifeline", "report", "beats", "log-bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--drain-seconds", type=float, required=True)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    for descriptor in (given.lifeline, given.report, given.beats):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 – positional only
    try:
        log = BoundedLog(given.log, given.log_bytes)
    except OSError as error:
        os.write(given.report, json.dumps({"failed": f"no log: {error}"}).encode() + b"\n")
        return
    warden = Warden(
        given.command,
        log,
        lifeline=given.lifeline,
        report=given.report,
        beats=given.beats,
        drain_seconds=given.drain_seconds,
    )
    warden.run()


if __name__ == "__main__":
    main()
