"""A real Redis goes away in every way it can: training goes on, and every message counts."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bus_machinery import KEYRING, PRUNED, SKIPPED, all_in, record, wait_for
from esper.bus.bus import EMERGENCY, TELEMETRY, Stream
from esper.bus.envelope import open_envelope
from esper.bus.link_state import LinkState
from esper.bus.messages import EventMessage
from esper.bus.mirror import missed_in
from esper.bus.redis_streams import RedisBus
from esper.bus.router import Router
from esper.bus.telemetry_link import TelemetryLink
from esper.lifecycle.events import BusLost, BusRegained, Event
from esper.telemetry import RunReader
from redis_server import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.slow]

BACK_SECONDS = 5.0


class NotingBus(RedisBus):
    """Notes the steps of the events whose arrival the server has acknowledged."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout_seconds=0.5)
        self.acknowledged: list[int] = []

    def publish(self, stream: Stream, messages: Sequence[bytes]) -> Sequence[str]:
        entries = super().publish(stream, messages)
        for message in messages:
            self.acknowledged += [
                said.record.step
                for said in all_in(open_envelope(message, KEYRING))
                if isinstance(said, EventMessage)
            ]
        return entries


class Training:
    """Steps of some real work, each with ten events, one of them critical now and then."""

    def __init__(self, bus: NotingBus, folder: Path, **options: int) -> None:
        self.state = LinkState()
        self.link = TelemetryLink(bus, KEYRING, "run", folder=folder, link=self.state, **options)
        self.link.begin({"task": "stand-in"}, {}, -1)
        self.published = 0
        self.outages: list[Event] = []
        self.seconds: list[float] = []
        self._matrix = torch.randn(192, 192)

    def step(self) -> None:
        for _ in range(8):
            self._matrix = torch.tanh(self._matrix @ self._matrix)
        for _ in range(10):
            self._publish(SKIPPED if self.published % 97 == 0 else PRUNED)
        for event in self.state.take_events():
            self.outages.append(event)
            self._publish(event)

    def _publish(self, event: Event) -> None:
        one = record(self.published, event)
        began = time.perf_counter()
        self.link.publish(one)
        self.seconds.append(time.perf_counter() - began)
        self.published += 1

    def go_on(self, steps: int, until: Callable[[], bool] = lambda: True) -> None:
        """Make at least so many steps, and go on until something holds."""
        end = time.monotonic() + 60.0
        while steps > 0 or not until():
            assert time.monotonic() < end
            self.step()
            steps -= 1

    def told(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.outages)


@contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    yield
    server.start()


@contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    server.pause()
    yield
    server.go_on()


@contextmanager
def out_of_memory(server: RedisServer) -> Iterator[None]:
    server.config_set(maxmemory="1")
    yield
    server.config_set(maxmemory="0")


@contextmanager
def out_of_disk(server: RedisServer) -> Iterator[None]:
    """Of a snapshot that cannot be written, whereupon Redis takes nothing any more."""
    in_its_way = server.folder / "dump.rdb"
    in_its_way.mkdir()
    snapshot(server, "err")
    yield
    in_its_way.rmdir()
    snapshot(server, "ok")


def snapshot(server: RedisServer, status: str) -> None:
    with server.client() as client:
        client.config_set("save", "3600 100000000")
        client.bgsave()
        wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == status)


@contextmanager
def routing(url: str, folder: Path) -> Iterator[Router]:
    bus = RedisBus(url, timeout_seconds=0.5)
    router, stop = Router(bus, KEYRING, folder), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(router.run, stop)
        try:
            yield router
        finally:
            stop.set()
            running.result()
            bus.close()


def stored_steps(folder: Path) -> Counter[int]:
    return Counter(row.step for row in RunReader(folder).events())


@pytest.mark.parametrize(
    ("outage", "times"), [(killed, 2), (paused, 1), (out_of_memory, 2), (out_of_disk, 1)]
)
def test_an_outage_costs_training_nothing_and_no_message(
    outage: Callable[[RedisServer], "contextmanager[None]"], times: int, tmp_path: Path
) -> None:
    fsync = None if outage is out_of_disk else "everysec"
    mirror = tmp_path / "mirrors" / "run"
    with (
        RedisServer(fsync=fsync) as server,
        routing(server.url, mirror.parent) as router,
    ):
        bus = NotingBus(server.url)
        training = Training(bus, tmp_path / "run")
        training.go_on(100)
        for number in range(1, times + 1):
            with outage(server):
                training.go_on(300, lambda number=number: training.told(BusLost) == number)
            back = time.monotonic()
            training.go_on(1, lambda number=number: training.told(BusRegained) == number)
            assert time.monotonic() - back < BACK_SECONDS
        training.go_on(100)
        training.link.end("finished")
        assert training.link.close() == 0
        wait_for(lambda: stored_steps(mirror).total() == training.published)
        wait_for(lambda: RunReader(mirror).status == "finished")
        assert router.facts().missed == 0
        bus.close()
    assert stored_steps(mirror) == Counter(range(training.published))
    assert set(bus.acknowledged) == set(range(training.published))
    assert [type(event) for event in training.outages] == times * [BusLost, BusRegained]
    assert statistics.median(training.seconds) < 1e-4


def test_a_server_that_is_away_at_the_start_gets_everything_when_it_comes(tmp_path: Path) -> None:
    mirror = tmp_path / "mirrors" / "run"
    with RedisServer() as server:
        server.kill()
        bus = NotingBus(server.url)
        training = Training(bus, tmp_path / "run")
        training.go_on(300, lambda: training.told(BusLost) == 1)
        with routing(server.url, mirror.parent):
            server.start()
            back = time.monotonic()
            training.go_on(1, lambda: training.told(BusRegained) == 1)
            assert time.monotonic() - back < BACK_SECONDS
            assert training.link.close() == 0
            wait_for(mirror.exists)
            wait_for(lambda: stored_steps(mirror).total() == training.published)
        bus.close()
    assert stored_steps(mirror) == Counter(range(training.published))
    assert RunReader(mirror).config() == {"task": "stand-in"}


def test_what_finds_no_room_in_a_long_outage_is_counted_and_nothing_else_is_missing(
    tmp_path: Path,
) -> None:
    mirror = tmp_path / "mirrors" / "run"
    with (
        RedisServer(fsync="everysec") as server,
        routing(server.url, mirror.parent) as router,
    ):
        bus = NotingBus(server.url)
        training = Training(bus, tmp_path / "run", max_spool_bytes=200_000)
        training.go_on(50)
        with killed(server):
            training.go_on(500, lambda: training.told(BusLost) == 1)
            spool = tmp_path / "run" / "spool"
            sizes = [path.stat().st_size for path in spool.rglob("*") if path.is_file()]
            assert 200_000 < sum(sizes) <= 400_000
        training.go_on(50, lambda: training.told(BusRegained) == 1)
        training.link.end("finished")
        assert training.link.close() == 0
        wait_for(lambda: RunReader(mirror).status == "finished")
        missed = router.facts().missed
        wait_for(lambda: stored_steps(mirror).total() + missed == training.published)
        bus.close()
    steps = stored_steps(mirror)
    assert set(steps.values()) == {1}
    assert set(bus.acknowledged) <= set(steps)
    unsure = len(set(steps) - set(bus.acknowledged))  # had arrived when the server was killed
    assert missed_in(mirror) == missed > 1000
    assert {*range(0, training.published, 97)} <= set(steps)  # none of the critical ones
    regained = [event for event in training.outages if isinstance(event, BusRegained)]
    (lost,) = (event.lost_messages + training.state._lost_messages for event in regained)
    assert lost == missed + unsure
    assert regained[0].lost_messages > 0.9 * missed  # few while the spool was still full


def test_streams_stay_within_their_length_while_nobody_reads(tmp_path: Path) -> None:
    with RedisServer() as server:
        bus = RedisBus(server.url)
        short = Stream(name=TELEMETRY.name, max_length=1000)
        for _ in range(5):
            bus.publish(short, 1000 * [b"x"])
        with server.client() as client:
            assert client.xlen(f"esper:{TELEMETRY.name}") == 1000
        assert EMERGENCY.max_length is not None
        assert TELEMETRY.max_length is not None
        bus.close()
