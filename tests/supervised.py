"""A real `esper serve`, the programs it runs, and what is left of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from esper.supervision.status import ServeStatus, ServiceStatus, StatusError, read_status

Found = TypeVar("Found")
HELD = "held"
WAIT_SECONDS = 60.0
MARK = "ESPER_TEST_MARK"
SERVE, STATUS = "serve", "status"

BEATING = """
import json, os, sys, time
descriptor = int(os.environ["ESPER_HEARTBEAT_FD"])
for line in sys.argv[1:]:
    print(line, flush=True)
step = 0
while True:
    step += 1
    os.write(descriptor, json.dumps({"state": "running", "step": step}).encode() + b"\\n")
    time.sleep(0.05)
    if os.path.exists("hang"):
        os.remove("hang")
        time.sleep(1000)
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeping = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
subprocess.Popen([sys.executable, "-S", "-c", sleeping])
subprocess.Popen([sys.executable, "-S", "-c", sleeping], start_new_session=True)
bare = subprocess.Popen([sys.executable, "-S", "-c", sleeping], env={})
with open("bare", "w") as file:
    file.write(str(bare.pid))
print("stubborn is up", flush=True)
time.sleep(1000)
"""
"""Ignores SIGTERM, and so do what it starts: one leaves its session, one has no environment."""
DAEMON = f"exec 9>{HELD}; setsid env -i sleep 100 & echo up; exec sleep 100"
"""For a shell: what it leaves behind has a session of its own, and no environment."""


def wait_for(condition: Callable[[], Found], seconds: float = WAIT_SECONDS) -> Found:
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
    return found


def processes_with(mark: str) -> list[int]:
    """Return the processes that were started with a mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if wanted in environment.split(b"\0"):
                found.append(int(folder.name))
    return found


class Holders:
    """Tells whether any process holds a pipe in a folder, `held`, wherever that process belongs."""

    def __init__(self, folder: Path) -> None:
        os.mkfifo(folder / HELD)
        self._reading = os.open(folder / HELD, os.O_RDONLY | os.O_NONBLOCK)

    def gone(self) -> bool:
        try:
            return os.read(self._reading, 1) == b""
        except BlockingIOError:
            return False


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


class Served:
    """Serves what a config says, in a folder of its own, until the block ends."""

    def __init__(self, folder: Path, config: str, **scripts: str) -> None:
        self.folder = folder
        self.mark = os.urandom(8).hex()
        for name, script in scripts.items():
            (folder / f"{name}.py").write_text(script)
        self.configure(config)

    def configure(self, config: str) -> None:
        """Write the file; PYTHON in it is this interpreter."""
        text = config.replace("PYTHON", sys.executable)
        (self.folder / "esper.toml").write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, MARK: self.mark, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def start(self, output: int | None = None) -> None:
        """Start it.

        Args:
            output: Descriptor that it prints to; None is the file that `output` reads.
        """
        with (self.folder / "out").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "esper", SERVE, "esper.toml", "--json"],
                cwd=self.folder,
                stdout=out if output is None else output,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.process.pid, *processes_with(self.mark)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command of esper beside it."""
        return subprocess.run(
            [sys.executable, "-m", "esper", command, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
            env=self.environment,
        )

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def notices(self) -> list[Any]:
        """What it has told so far."""
        lines = self.output.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line[-1] == "\n"]

    def states(self, name: str) -> list[str]:
        """The states that a program has been in, in their order."""
        return [told["state"] for told in self.notices if told["about"] == name and "state" in told]

    @property
    def status(self) -> ServeStatus | None:
        try:
            return read_status(self.folder / "serve")
        except StatusError:
            return None

    def service(self, name: str) -> ServiceStatus | None:
        status = self.status
        if status is None:
            return None
        return next((service for service in status.services if service.name == name), None)

    def wait_for(self, name: str, state: str, seconds: float = WAIT_SECONDS) -> ServiceStatus:
        """Wait until a program is in a state."""

        def there() -> ServiceStatus | None:
            assert self.process.poll() is None, self.output
            service = self.service(name)
            return service if service is not None and service.state == state else None

        try:
            found = wait_for(there, seconds)
        except AssertionError as error:
            raise AssertionError(self.output) from error
        assert found is not None
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end, and return the exit code."""
        return self.process.wait(WAIT_SECONDS)
