"""A real redis-server on this machine, which a test can stop, kill, pause and start again."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import pytest
import redis

PROGRAM = "redis-server"
NO_SERVER = f"no {PROGRAM} here: install Debian's redis-server (make redis)"
_START_SECONDS = 30.0
_ATTEMPTS = 5


class RedisServer:
    """Listens on a free port of 127.0.0.1, and keeps its data in a folder of its own.

    Use as a context manager, or call `start` and, whatever happens, `stop`. A test is skipped where
    no redis-server is installed.

    Args:
        fsync: When what is written is on the disk: "always" before it is answered, "everysec"
            within about a second; None keeps nothing.
        password: That clients must give.
        settings: Any others, as in redis.conf.

    Attributes:
        port: That it listens on.
        folder: Its data and its log.

    Example:
        with RedisServer(fsync="always") as server:
            bus = RedisBus(server.url)
            server.kill()
            server.start()
    """

    def __init__(
        self,
        *,
        fsync: Literal["always", "everysec"] | None = None,
        password: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.password = password
        self.port = 0
        self.folder = Path(tempfile.mkdtemp(prefix="esper-redis-"))
        self._settings = {
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "appendonly": "no" if fsync is None else "yes",
            "appendfsync": fsync or "no",
            **({} if password is None else {"requirepass": password}),
            **(settings or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is; without the password."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "it is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, with the port and data that it had; returns when it answers."""
        program = shutil.which(PROGRAM)
        if program is None:
            pytest.skip(NO_SERVER)
        assert self._process is None, "it is running"
        for _ in range(_ATTEMPTS if not self.port else 1):
            port = self.port or _free_port()
            if self._started(program, port):
                self.port = port
                return
        raise AssertionError(f"redis-server does not start: {self.log[-2000:]}")

    def stop(self) -> None:
        """End it if it runs, and forget its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """End it with SIGKILL if it runs; its data stay as they are on the disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it do nothing, with all its connections open."""
        assert self._process is not None, "it is not running"
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a pause."""
        assert self._process is not None, "it is not running"
        self._process.send_signal(signal.SIGCONT)

    def config_set(self, **settings: str) -> None:
        """Change settings while it runs; names are written with _ for -."""
        with self.client() as client:
            for name, value in settings.items():
                client.config_set(name.replace("_", "-"), value)

    def client(self) -> redis.Redis:
        """Return a plain client, to look at what is there or to write what esper would not."""
        return redis.Redis(port=self.port, password=self.password, protocol=2)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self, program: str, port: int) -> bool:
        """Start it; returns whether it answers, else it has ended: the port was taken meanwhile."""
        options = [
            word
            for name, value in {**self._settings, "port": str(port)}.items()
            for word in (f"--{name}", value)
        ]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen([program, *options], stdout=log, stderr=log)
        self._process = process
        end = time.monotonic() + _START_SECONDS
        while process.poll() is None:
            if _answers(port):
                return True
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"redis-server does not answer: {self.log[-2000:]}")
            time.sleep(0.01)
        self._process = None
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(port: int) -> bool:
    """Return whether a server is there and has read its data, a password aside."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False
