"""Router and dashboard beat for what they have done, not because their process is there."""

import gc
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper.bus.bus import EMERGENCY, TELEMETRY, BusUnavailableError
from esper.bus.in_process import InProcessBus
from esper.supervision import children
from esper.supervision.beating_bus import BeatingBus
from esper.supervision.children import _beat_when_answered, route
from esper.telemetry.heartbeat import Heartbeat
from supervised import wait_for


def test_readers_beat_only_once_all_of_them_have_come_round() -> None:
    beats: list[str] = []
    bus = BeatingBus(InProcessBus(), (EMERGENCY, TELEMETRY), beats.append)
    first, second = (
        bus.subscribe(stream, group="g", consumer="c") for stream in (EMERGENCY, TELEMETRY)
    )
    for _ in range(5):
        first.receive(limit=1, wait_seconds=0.0)
    assert beats == []
    second.receive(limit=1, wait_seconds=0.0)
    assert beats == ["reading"]
    second.renew([])  # it waits for a full disk, and does not hang
    assert beats == ["reading"]
    first.receive(limit=1, wait_seconds=0.0)
    assert beats == ["reading", "reading"]


def test_what_the_bus_imports_is_left_out_of_garbage_collection_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: done.append("frozen"))
    monkeypatch.setattr(
        children, "open_run_bus", lambda _: (done.append("imported"), InProcessBus())[1]
    )
    monkeypatch.setattr(children.Router, "run", lambda *_: done.append("routing"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("ESPER_HEARTBEAT_FD", raising=False)
    (tmp_path / "keys").write_text("k" * 32)
    (tmp_path / "keys").chmod(0o600)
    route("redis://here", tmp_path, tmp_path / "keys")
    assert done == ["imported", "frozen", "routing"]


class Away:
    """A bus whose server is away."""

    def subscribe(self, *_: object, **__: object) -> None:
        raise BusUnavailableError("nobody is there")


def test_readers_that_cannot_read_do_not_hang() -> None:
    beats: list[str] = []
    bus = BeatingBus(Away(), (EMERGENCY, TELEMETRY), beats.append)  # type: ignore[arg-type]
    for stream in (EMERGENCY, TELEMETRY):
        with pytest.raises(BusUnavailableError):
            bus.subscribe(stream, group="g", consumer="c")
    assert beats == ["bus away"]


@contextmanager
def probing(port: int) -> Iterator[int]:
    """Probe a server on a port; yield the reading end of its heartbeat."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    over = threading.Event()
    arguments = (Heartbeat(writing), "127.0.0.1", port, over)
    thread = threading.Thread(target=_beat_when_answered, args=arguments)
    thread.start()
    try:
        yield reading
    finally:
        over.set()
        thread.join()
        os.close(reading)
        os.close(writing)


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


def test_a_dashboard_that_takes_requests_and_answers_none_does_not_beat() -> None:
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    came = threading.Semaphore(0)

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                came.release()
                if answers.get():
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with probing(server.getsockname()[1]) as beats:
            assert came.acquire(timeout=10.0)
            time.sleep(0.05)  # it would beat meanwhile
            assert read(beats) == b""
            answers.put(False)
            assert came.acquire(timeout=10.0)
            assert read(beats) == b""
            answers.put(True)
            assert b'"serving"' in wait_for(lambda: read(beats))
            answers.put(True)
            answers.put(True)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
