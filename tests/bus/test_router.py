"""What runs tell is stored once in folders that all tools read, and nothing else is."""

import logging
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bus_machinery import KEYRING, OTHER_KEYRING, SKIPPED, Clock, files_of_at_most, record, wait_for
from commanded import KEYRING as COMMAND_KEYRING
from commanded import CountedRun
from esper.bus.bus import DEAD_LETTERS, EMERGENCY, TELEMETRY, Bus, Delivery, Stream
from esper.bus.dead_letter import DeadLetter
from esper.bus.envelope import MessageRefusedError, Sealer, open_envelope
from esper.bus.held_runs import HeldRuns
from esper.bus.in_process import InProcessBus
from esper.bus.link_state import LinkState
from esper.bus.messages import (
    EventMessage,
    HealthMessage,
    Message,
    MetricsMessage,
    RunMessage,
    StatusMessage,
    body_of,
    bundle_of,
    message_in,
)
from esper.bus.mirror import Mirror, NoMirrorError, Taken, Told, _making, missed_in
from esper.bus.mirrors import Mirrors, check_name
from esper.bus.producers import note_producers
from esper.bus.redis_streams import RedisBus
from esper.bus.router import Router, RouterFacts
from esper.bus.telemetry_link import TelemetryLink
from esper.cli.app import app
from esper.dashboard.bus_channel import BusCommandChannel
from esper.dashboard.commands import Command, CommandRefusedError
from esper.lifecycle.events import EventRecord, RunWentBack
from esper.telemetry import RunFolderError, RunReader, RunStore
from esper.telemetry.run_folder import WriterLock, is_written
from processes import TESTS
from redis_server import RedisServer
from tracked_run import CONFIG, tell_run


@contextmanager
def routing(
    bus: Bus, folder: Path, kind: type[Router] = Router, **options: Any
) -> Iterator[Router]:
    router = kind(bus, KEYRING, folder, **options)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(router.run, stop)
        try:
            yield router
        finally:
            stop.set()
            running.result()


class Telling:
    """One attempt of a run, told by hand; batches are what a test makes of them."""

    def __init__(self, run: str = "run") -> None:
        self.run = run
        self._sealers = {stream.name: Sealer(KEYRING, run) for stream in (EMERGENCY, TELEMETRY)}

    def sealed(self, stream: Stream, *messages: Message) -> list[bytes]:
        return [self._sealers[stream.name].seal(body_of(message))[1] for message in messages]

    def note_in(self, folder: Path) -> None:
        note_producers(folder, [sealer.producer for sealer in self._sealers.values()])

    def told(self, stream: Stream, *messages: Message) -> list[Told]:
        sealed = self.sealed(stream, *messages)
        envelopes = [open_envelope(one, KEYRING) for one in sealed]
        return [
            Told(stream=stream, envelope=envelope, message=message)
            for envelope, message in zip(envelopes, messages, strict=True)
        ]


def began(after_step: int = -1, **config: str) -> RunMessage:
    return RunMessage(config=config, environment={"device": "cpu"}, after_step=after_step)


def events(*steps: int, critical: bool = False) -> list[EventMessage]:
    return [
        EventMessage(record=record(step, SKIPPED) if critical else record(step)) for step in steps
    ]


def steps_in(folder: Path) -> list[int]:
    return [row.step for row in RunReader(folder).events()]


def reasons(bus: Bus) -> list[str]:
    letters = bus.latest(DEAD_LETTERS, limit=1000)
    return [DeadLetter.model_validate_json(letter.message).reason for letter in letters]


def test_a_mirror_is_read_as_the_folder_of_the_run_itself(tmp_path: Path) -> None:
    bus = InProcessBus()
    own = RunStore(tmp_path / "own", config=CONFIG, environment={"device": "cpu"})
    with routing(bus, tmp_path / "mirrors") as router:
        link = TelemetryLink(bus, KEYRING, "run-1", folder=tmp_path / "own", link=LinkState())
        link.begin(CONFIG, {"device": "cpu"}, -1)
        for sink in (own, link):
            tell_run(sink)
        own.set_status("finished")
        link.end("finished")
        assert link.close() == 0
        wait_for(lambda: router.facts().stored == 2 + len(RunReader(tmp_path / "own").events()) + 4)
        assert router.facts().runs == 1
        mirrored = RunReader(tmp_path / "mirrors" / "run-1")
        assert mirrored.is_written
    own.close()
    reader = RunReader(tmp_path / "own")
    assert sorted(map(repr, mirrored.events())) == sorted(map(repr, reader.events()))
    normal = [repr(row) for row in reader.events() if row.event.priority == "normal"]
    assert [repr(row) for row in mirrored.events() if row.event.priority == "normal"] == normal
    assert [row.value for row in mirrored.metrics(name="top-5 %")] == [0.5]
    assert repr(mirrored.metrics()) == repr(reader.metrics())
    assert mirrored.glance().event_counts == reader.glance().event_counts
    assert (mirrored.status, mirrored.attempt, mirrored.is_written) == ("finished", 1, False)
    assert (mirrored.config(), mirrored.environment()) == (reader.config(), reader.environment())
    assert missed_in(tmp_path / "mirrors" / "run-1") == 0
    assert missed_in(tmp_path / "own") is None
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "mirrors" / "run-1")])
    assert shown.exit_code == 0, shown.output


@pytest.fixture(params=["in process", pytest.param("redis", marks=pytest.mark.redis)])
def any_bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    if request.param == "in process":
        yield InProcessBus()
        return
    with RedisServer() as server:
        bus = RedisBus(server.url)
        yield bus
        bus.close()


@pytest.mark.slow
def test_what_a_stream_lost_while_nobody_read_it_is_counted_exactly(
    any_bus: Bus, tmp_path: Path
) -> None:
    short = Stream(name=TELEMETRY.name, max_length=10_000)
    telling = Telling()
    for begin in range(0, 100_000, 1000):
        any_bus.publish(short, telling.sealed(short, *events(*range(begin, begin + 1000))))
    with routing(any_bus, tmp_path) as router:
        wait_for(lambda: router.facts().stored == 10_000, seconds=60.0)
        facts = router.facts()
    assert facts == RouterFacts(stored=10_000, missed=90_000, runs=1)
    assert steps_in(tmp_path / "run") == [*range(90_000, 100_000)]
    assert missed_in(tmp_path / "run") == 90_000
    assert RunReader(tmp_path / "run").config() == {}


def test_an_emergency_waits_for_a_few_hundred_events_to_be_stored_not_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles hold many events, and 500 of them are received at once."""
    bus, telling = InProcessBus(), Telling()
    stored_at_once: list[tuple[str, int]] = []
    opened, storing = threading.Event(), Mirror.take

    class Watched(Router):
        def _opened(self, delivery: Delivery, stream: Stream) -> Told:
            told = super()._opened(delivery, stream)
            if stream == EMERGENCY:
                opened.set()
            return told

    def take(mirror: Mirror, told: list[Told]) -> Taken:
        if not stored_at_once:  # the emergency comes while the first telemetry is being stored
            bus.publish(EMERGENCY, telling.sealed(EMERGENCY, *events(7, critical=True)))
            assert opened.wait(30.0)
        stored_at_once.append((told[0].stream.name, sum(len(one.envelope.numbers) for one in told)))
        return storing(mirror, told)

    monkeypatch.setattr(Mirror, "take", take)
    sealer = Sealer(KEYRING, "run")
    for begin in range(0, 3000, 100):
        bundle = bundle_of([body_of(event) for event in events(*range(begin, begin + 100))])
        bus.publish(TELEMETRY, [sealer.seal(bundle, messages=100)[1]])
    with routing(bus, tmp_path, Watched) as router:
        wait_for(lambda: router.facts().stored == 3001)
    assert stored_at_once.index((EMERGENCY.name, 1)) <= 2
    telemetry = [count for name, count in stored_at_once if name == TELEMETRY.name]
    assert telemetry == [200] * 15


KILLED = """
import sys, threading
from pathlib import Path
from bus_machinery import KEYRING
from esper.bus.redis_streams import RedisBus
from esper.bus.router import Router

class Hanging:
    def __init__(self, subscription):
        self._subscription = subscription
    def __getattr__(self, name):
        return getattr(self._subscription, name)
    def acknowledge(self, entries):
        if entries:
            print("stored", flush=True)
            threading.Event().wait()

bus = RedisBus(sys.argv[1])
subscribe = bus.subscribe
bus.subscribe = lambda *args, **options: Hanging(subscribe(*args, **options))
Router(bus, KEYRING, Path(sys.argv[2])).run(threading.Event())
"""


@pytest.mark.redis
def test_a_router_that_is_killed_before_it_acknowledges_doubles_nothing(tmp_path: Path) -> None:
    with RedisServer() as server:
        bus = RedisBus(server.url)
        first = Telling()
        bus.publish(TELEMETRY, first.sealed(TELEMETRY, began(), *events(*range(300))))
        second = Telling()
        bus.publish(TELEMETRY, second.sealed(TELEMETRY, began(99), *events(*range(100, 150))))
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", KILLED, server.url, str(tmp_path)],
                stdout=subprocess.PIPE,
                cwd=TESTS,
            )
            assert process.stdout is not None
            assert process.stdout.readline() == b"stored\n"
            process.kill()
            process.communicate()
        expected = [*range(100), *range(100, 150)]
        assert steps_in(tmp_path / "run") == expected
        bus.publish(TELEMETRY, second.sealed(TELEMETRY, *events(150)))
        with routing(bus, tmp_path) as router:
            wait_for(lambda: router.facts().stored == 1)
            assert router.facts() == RouterFacts(stored=1, again=352, runs=1)
        assert steps_in(tmp_path / "run") == [*expected, 150]
        assert missed_in(tmp_path / "run") == 0
        bus.close()


def test_a_run_that_goes_on_forgets_what_came_later_once_and_in_each_stream_by_itself(
    tmp_path: Path,
) -> None:
    mirror = Mirror(tmp_path / "run")
    first, second = Telling(), Telling()
    values = [MetricsMessage(epoch=1, step=step, metrics={"loss": 1.0}) for step in (10, 20)]
    ended = StatusMessage(status="interrupted")
    back = EventMessage(record=record(18, RunWentBack(from_step=18, to_step=9, same_batches=True)))
    mirror.take(first.told(TELEMETRY, began(task="digits"), *events(5, 15), back, *values))
    mirror.take(first.told(EMERGENCY, began(task="digits"), *events(6, 16, critical=True)))
    again = second.told(EMERGENCY, began(10, task="other"), *events(11, critical=True))
    mirror.take(again)
    assert sorted(steps_in(tmp_path / "run")) == [5, 6, 11, 15, 18]
    mirror.take(first.told(TELEMETRY, *events(17), ended))
    assert RunReader(tmp_path / "run").status == "interrupted"
    attempt = RunReader(tmp_path / "run").attempt
    later = second.told(TELEMETRY, began(10, task="other"), *events(12))
    mirror.take(later)
    expected = [5, 6, 11, 12]
    assert sorted(steps_in(tmp_path / "run")) == expected
    assert [row.step for row in RunReader(tmp_path / "run").metrics()] == [10]
    assert RunReader(tmp_path / "run").attempt > attempt > 1
    assert RunReader(tmp_path / "run").status == "running"
    assert RunReader(tmp_path / "run").config() == {"task": "digits"}
    for known in (again, later):
        taken = mirror.take(known)
        assert (taken.stored, taken.again) == (0, 2)
    mirror.close()
    mirror = Mirror(tmp_path / "run")
    assert mirror.take(later[:1]).again == 1
    mirror.close()
    assert sorted(steps_in(tmp_path / "run")) == expected


def test_a_run_whose_first_message_was_lost_in_one_stream_forgets_by_the_other(
    tmp_path: Path,
) -> None:
    mirror = Mirror(tmp_path / "run")
    first, second = Telling(), Telling()
    mirror.take(first.told(EMERGENCY, began(task="digits")))
    mirror.take(first.told(TELEMETRY, began(), *events(5, 15)))
    mirror.take(second.told(EMERGENCY, began(10), *events(11, critical=True)))
    lost, *arrived = second.told(TELEMETRY, began(10), *events(12, 13))
    assert mirror.take(arrived).missed == 1
    assert sorted(steps_in(tmp_path / "run")) == [5, 11, 12, 13]
    assert mirror.take([lost]).missed == -1  # late, and without effect by now
    assert sorted(steps_in(tmp_path / "run")) == [5, 11, 12, 13]
    mirror.close()


def test_what_an_attempt_tells_after_the_next_one_has_begun_holds_up_to_where_that_began(
    tmp_path: Path,
) -> None:
    mirror = Mirror(tmp_path / "run")
    first, second = Telling(), Telling()
    mirror.take(first.told(TELEMETRY, began(), *values(10, loss=1.0))[1:])
    late_one, *arrived = second.told(TELEMETRY, began(20, task="digits"), *values(30, loss=2.0))
    mirror.take(arrived)
    late = first.told(
        TELEMETRY, *events(15, 25), *values(20, loss=1.0), StatusMessage(status="failed")
    )
    mirror.take([late_one, *late, *first.told(TELEMETRY, *values(30, loss=1.0))])
    assert steps_in(tmp_path / "run") == [15]
    assert losses_in(tmp_path / "run") == [(10, 1.0), (30, 2.0), (20, 1.0)]
    assert RunReader(tmp_path / "run").status == "running"
    assert RunReader(tmp_path / "run").config() == {"task": "digits"}
    mirror.close()
    assert missed_in(tmp_path / "run") == 1


def test_a_batch_that_cannot_be_stored_leaves_nothing_and_can_come_again(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "run")
    told = Telling().told(TELEMETRY, began(), *events(1, 2))
    broken = MetricsMessage(epoch=1, step=1 << 70, metrics={"loss": 1.0})
    with pytest.raises(OverflowError):
        mirror.take([*told, *Telling().told(TELEMETRY, broken)])
    assert steps_in(tmp_path / "run") == []
    taken = mirror.take(told)
    assert (taken.stored, taken.again, taken.missed) == (3, 0, 0)
    mirror.close()


def test_a_full_disk_is_waited_for_and_nothing_is_lost_or_doubled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bus, telling = InProcessBus(), Telling()
    with caplog.at_level(logging.WARNING, logger="esper"), routing(bus, tmp_path) as router:
        bus.publish(TELEMETRY, telling.sealed(TELEMETRY, began(), *events(0)))
        wait_for(lambda: router.facts().stored == 2)
        with files_of_at_most(100_000):
            bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(*range(1, 2001))))
            wait_for(lambda: bool(caplog.records))
        wait_for(lambda: router.facts().stored == 2002)
    assert steps_in(tmp_path / "run") == [*range(2001)]
    assert len(caplog.records) == 1
    assert "what run run tells cannot be stored now" in caplog.text
    assert reasons(bus) == []


def make_empty(folder: Path) -> None:
    (folder / "run.sqlite").touch()


def make_a_database_of_something_else(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "run.sqlite")) as database:
        database.execute("CREATE TABLE other (key TEXT)")


def make_a_mirror_that_cannot_be_locked(folder: Path) -> None:
    folder.rmdir()
    Mirror(folder).close()
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()


@pytest.mark.parametrize(
    ("make", "passed_over"),
    [
        (make_empty, 2),
        (make_a_database_of_something_else, 2),
        (make_a_mirror_that_cannot_be_locked, 0),
    ],
)
def test_a_folder_that_cannot_be_written_holds_up_no_other_run(
    make: Callable[[Path], None], passed_over: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad")
    bus, bad, good = InProcessBus(), Telling("bad"), Telling("good")
    with caplog.at_level(logging.WARNING, logger="esper"), routing(bus, tmp_path) as router:
        bus.publish(TELEMETRY, bad.sealed(TELEMETRY, *events(1, 2)))
        wait_for(lambda: "bad" in caplog.text)
        bus.publish(TELEMETRY, good.sealed(TELEMETRY, *events(1, 2, 3)))
        wait_for(lambda: router.facts().stored == 3, seconds=10.0)
        assert router.facts().passed_over == passed_over
    assert steps_in(tmp_path / "good") == [1, 2, 3]


def values(*steps: int, loss: float) -> list[MetricsMessage]:
    return [MetricsMessage(epoch=1, step=step, metrics={"loss": loss}) for step in steps]


def losses_in(folder: Path) -> list[tuple[int, float]]:
    return [(row.step, row.value) for row in RunReader(folder).metrics()]


@contextmanager
def held(folder: Path, statement: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """Hold a mirror as another process does that writes its database, or reads it."""
    with closing(sqlite3.connect(folder / "run.sqlite", isolation_level=None)) as database:
        database.execute(statement)
        database.execute("SELECT count(*) FROM metrics").fetchone()
        yield


def test_a_mirror_that_is_locked_holds_up_nobody_and_its_messages_come_again_once_it_is_free(
    any_bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bus, locked, good = any_bus, Telling("locked"), Telling("good")
    with caplog.at_level(logging.WARNING, logger="esper"), routing(bus, tmp_path) as router:
        bus.publish(TELEMETRY, locked.sealed(TELEMETRY, *events(1)))
        wait_for(lambda: router.facts().stored == 1)
        with held(tmp_path / "locked"):
            for number, stream in enumerate((TELEMETRY, EMERGENCY), start=1):
                critical = stream is EMERGENCY
                bus.publish(stream, locked.sealed(stream, *events(2, critical=critical)))
                wait_for(lambda number=number: len(caplog.records) == number, seconds=5.0)
                bus.publish(stream, good.sealed(stream, *events(3, critical=critical)))
            wait_for(lambda: router.facts().stored == 3, seconds=5.0)
        wait_for(lambda: router.facts().stored == 5, seconds=10.0)
    assert steps_in(tmp_path / "good") == [3, 3]
    assert steps_in(tmp_path / "locked") == [1, 2, 2]
    assert reasons(bus) == []


def test_nothing_overtakes_what_is_left_of_a_run(
    any_bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mirror forgets by the order in which a run's attempts tell of themselves."""
    bus, first, second = any_bus, Telling(), Telling()
    with caplog.at_level(logging.WARNING, logger="esper"), routing(bus, tmp_path) as router:
        told = first.sealed(TELEMETRY, began(), *values(10, 20, loss=1.0))
        bus.publish(TELEMETRY, told)
        wait_for(lambda: router.facts().stored == 3)
        with held(tmp_path / "run"):
            late = first.sealed(
                TELEMETRY, *values(30, loss=1.0), StatusMessage(status="interrupted")
            )
            bus.publish(TELEMETRY, late)
            wait_for(lambda: len(caplog.records) == 1)
        bus.publish(TELEMETRY, second.sealed(TELEMETRY, began(20), *values(30, loss=2.0)))
        wait_for(lambda: router.facts().stored == 7, seconds=10.0)
        assert router.facts() == RouterFacts(stored=7, runs=1)
    assert losses_in(tmp_path / "run") == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert RunReader(tmp_path / "run").status == "running"


def test_what_is_left_is_asked_for_again_soon_but_no_more_often_than_it_comes_by_itself() -> None:
    """A message is delivered five times: one run must not use up what the others have of them."""
    clock = Clock()
    held = HeldRuns(again_seconds=30.0, clock=clock)
    assert held.next_to_try() is None
    held.hold("locked")
    held.hold("other")
    assert [held.next_to_try() for _ in range(2)] == ["locked", None]
    clock.seconds += 0.2
    assert held.next_to_try() == "other"
    held.let_go()
    assert "locked" not in held
    held.hold("locked")
    clock.seconds += 29.9
    assert held.next_to_try() is None
    clock.seconds += 0.1
    assert held.next_to_try() == "locked"
    assert "locked" in held


def test_a_run_is_told_in_its_order_though_routers_come_and_go_while_its_mirror_is_read(
    any_bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever reads a mirror that no router has open holds up the next one that opens it."""
    bus, first, second = any_bus, Telling(), Telling()
    with routing(bus, tmp_path) as router:
        bus.publish(EMERGENCY, first.sealed(EMERGENCY, began(), *events(40, critical=True)))
        bus.publish(TELEMETRY, first.sealed(TELEMETRY, began(), *values(10, 20, 30, loss=1.0)))
        wait_for(lambda: router.facts().stored == 6)
    with ExitStack() as reading, caplog.at_level(logging.WARNING, logger="esper"):
        reading.enter_context(held(tmp_path / "run", "BEGIN"))
        for stream in (EMERGENCY, TELEMETRY):
            bus.publish(stream, second.sealed(stream, began(20)))
        for number, consumer in enumerate(("second", "third")):
            caplog.clear()
            with routing(bus, tmp_path, consumer=consumer) as router:
                wait_for(lambda: len(caplog.records) == 2)
                told = second.sealed(TELEMETRY, *values(30 + 10 * number, loss=2.0))
                bus.publish(TELEMETRY, told)
                if consumer == "third":
                    reading.close()
                    bus.publish(EMERGENCY, second.sealed(EMERGENCY, *events(50, critical=True)))
                    bus.publish(TELEMETRY, second.sealed(TELEMETRY, *values(50, loss=2.0)))
                    wait_for(lambda router=router: router.facts().stored == 6, seconds=10.0)
                    assert router.facts() == RouterFacts(stored=6, runs=1)
    assert losses_in(tmp_path / "run") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert steps_in(tmp_path / "run") == [50]
    assert reasons(bus) == []


def test_a_mirror_that_could_not_be_opened_can_be_when_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays locked, wherever opening it has failed."""
    folder = tmp_path / "run"
    Mirror(folder).close()
    with closing(sqlite3.connect(folder / "run.sqlite")) as holding:
        holding.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            Mirror(folder)
    with monkeypatch.context() as failing:
        failing.setattr(Mirror, "_loaded", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Mirror(folder)
    Mirror(folder).close()


def test_a_mirror_that_another_process_writes_is_not_waited_for(tmp_path: Path) -> None:
    """All runs have one thread, and their emergencies would wait too."""
    Mirror(tmp_path / "run").close()
    lock = WriterLock(tmp_path / "run")
    began = time.monotonic()
    with pytest.raises(RunFolderError, match="being written by another process"):
        Mirror(tmp_path / "run")
    assert time.monotonic() - began < 0.5
    lock.release()


def test_what_is_stored_is_acknowledged_though_storing_the_rest_fails_unexpectedly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, storing = InProcessBus(), Mirror.take

    def take(mirror: Mirror, told: list[Told]) -> Taken:
        if mirror.folder.name == "bad":
            raise RuntimeError("a defect")
        return storing(mirror, told)

    monkeypatch.setattr(Mirror, "take", take)
    bad = Telling("bad").sealed(TELEMETRY, *events(2))
    bus.publish(TELEMETRY, [*Telling("good").sealed(TELEMETRY, *events(1)), *bad])
    with pytest.raises(RuntimeError, match="a defect"):
        Router(bus, KEYRING, tmp_path).run(threading.Event())
    left = bus.subscribe(TELEMETRY, group="router", consumer="next")
    left.reclaim()
    assert [one.message for one in left.receive(limit=9, wait_seconds=0.0)] == bad


def test_a_folder_of_mirrors_that_cannot_be_made_is_waited_for_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bus, telling = InProcessBus(), Telling()
    (tmp_path / "mirrors").touch()
    folder = tmp_path / "mirrors"
    with caplog.at_level(logging.WARNING, logger="esper"), routing(bus, folder) as router:
        bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(1, 2)))
        wait_for(lambda: "cannot be stored now" in caplog.text)
        folder.unlink()
        wait_for(lambda: router.facts().stored == 2, seconds=10.0)
    assert steps_in(folder / "run") == [1, 2]


def test_a_run_is_commanded_by_way_of_its_mirror(tmp_path: Path) -> None:
    bus, made, over = InProcessBus(), threading.Event(), threading.Event()

    def step() -> None:
        run = CountedRun(tmp_path / "own", bus, run="run-1234")
        made.set()
        run.step_until(over.is_set)
        run.close()

    Mirror(tmp_path / "mirrors" / "run-1234").close()
    assert RunReader(tmp_path / "mirrors" / "run-1234").run_id == "run-1234"
    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(step)
        assert made.wait(30.0)
        channel = BusCommandChannel(tmp_path / "mirrors", bus, COMMAND_KEYRING, sender="ann")
        try:
            with pytest.raises(CommandRefusedError, match="the run was not paused"):
                channel.send(Command(run="run-1234", action="resume", slot=None))
        finally:
            over.set()
        stepping.result()


def test_a_run_of_this_machine_is_left_alone_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path / "local", config={}, environment={})
    store.publish(record(1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    bus = InProcessBus()
    with caplog.at_level(logging.WARNING, logger="esper"), routing(bus, tmp_path) as router:
        for run in ("local", "folder", "link", "remote"):
            telling = Telling(run)
            for _ in range(3):
                bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(2)))
        wait_for(lambda: sum(router.facts().model_dump().values()) == 13)
        assert router.facts() == RouterFacts(stored=3, passed_over=9, runs=1)
    store.close()
    assert steps_in(tmp_path / "local") == [1]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]
    assert not (tmp_path / "elsewhere").exists()
    assert steps_in(tmp_path / "remote") == [2, 2, 2]
    assert [entry.getMessage().split()[2] for entry in caplog.records] == [
        "local",
        "folder",
        "link",
    ]


def made_run(folder: Path) -> str:
    """Make a run that nobody trains now, and return its id."""
    store = RunStore(folder, config={}, environment={})
    store.close()
    return store.run_id


@pytest.mark.parametrize("name", ["run", ".hidden", "a\tb", 250 * "x"], ids=range(4))
def test_a_run_that_is_trained_into_the_folder_of_mirrors_has_none_beside_it(
    name: str, tmp_path: Path
) -> None:
    """Nor once it has ended, or is to be resumed, when the router hears of it."""
    bus, runs = InProcessBus(), tmp_path / "runs"
    run = made_run(runs / name)
    with ExitStack() as links, routing(bus, runs) as router:
        for attempt in (1, 2):
            link = TelemetryLink(bus, KEYRING, run, folder=runs / name, link=LinkState())
            links.callback(link.close)
            link.publish(record(attempt))
            link.publish(record(attempt, SKIPPED))
            wait_for(lambda attempt=attempt: sum_of(router) >= 2 * attempt)
            assert router.facts() == RouterFacts(passed_over=2 * attempt)
        bus.publish(TELEMETRY, Telling("run-01234567").sealed(TELEMETRY, *events(1)))
        wait_for(lambda: router.facts().stored == 1)
        (runs / name).rename(tmp_path / "away")
        link.publish(record(3))
        wait_for(lambda: router.facts().stored == 2)
    assert steps_in(runs / run) == [3]


def sum_of(router: Router) -> int:
    return router.facts().stored + router.facts().passed_over


def test_a_run_that_cannot_note_by_whom_it_tells_is_known_while_it_is_being_written(
    tmp_path: Path,
) -> None:
    bus, store = InProcessBus(), RunStore(tmp_path / "run", config={}, environment={})
    (tmp_path / "run" / "spool").touch()
    with closing(store), routing(bus, tmp_path) as router:
        link = TelemetryLink(bus, KEYRING, store.run_id, folder=store.folder, link=LinkState())
        link.publish(record(1))
        bus.publish(TELEMETRY, Telling("run-01234567").sealed(TELEMETRY, *events(1)))
        wait_for(lambda: sum_of(router) == 2)
        assert router.facts() == RouterFacts(stored=1, passed_over=1, runs=1)
        link.close()


def test_a_run_elsewhere_of_which_a_copy_is_here_has_a_mirror(tmp_path: Path) -> None:
    telling = Telling(made_run(tmp_path / "elsewhere" / "run"))
    telling.note_in(tmp_path / "elsewhere" / "run")
    shutil.copytree(tmp_path / "elsewhere" / "run", tmp_path / "runs" / "run")
    with closing(Mirrors(tmp_path / "runs")) as mirrors:
        assert mirrors.take(telling.run, telling.told(TELEMETRY, *events(1))) is not None
    assert steps_in(tmp_path / "runs" / telling.run) == [1]


def test_a_run_that_was_trained_here_has_a_mirror_once_a_copy_of_it_goes_on_elsewhere(
    tmp_path: Path,
) -> None:
    here = Telling(made_run(tmp_path / "run"))
    here.note_in(tmp_path / "run")
    elsewhere = Telling(here.run)
    with closing(Mirrors(tmp_path)) as mirrors:
        assert mirrors.take(here.run, here.told(TELEMETRY, *events(1))) is None
        assert mirrors.take(here.run, elsewhere.told(TELEMETRY, *events(2))) is not None
    assert steps_in(tmp_path / here.run) == [2]


def test_a_mirror_that_somebody_renames_is_not_taken_for_the_run_itself(tmp_path: Path) -> None:
    """Not even while another router has it open."""
    telling = Telling("run-01234567")
    with closing(Mirrors(tmp_path)) as first, closing(Mirrors(tmp_path)) as second:
        first.take(telling.run, telling.told(TELEMETRY, *events(1)))
        (tmp_path / telling.run).rename(tmp_path / "run")
        assert second.take(telling.run, telling.told(TELEMETRY, *events(2))) is not None
    assert steps_in(tmp_path / telling.run) == [2]


ODD_RUNS = [
    *("../x", "a/b", "/x", "..", ".", ".hidden", "a\\b", "a\0b", "a\nb", "\u202e", "\x1b[2J"),
    *(255 * "é", " \u2028"),
]


@pytest.mark.parametrize("run", [*ODD_RUNS, "", 4000 * "x"])
def test_no_folder_has_an_odd_name(run: str) -> None:
    with pytest.raises(MessageRefusedError, match="no folder can have the name of run"):
        check_name(run)


@pytest.mark.parametrize("run", ["digits-1", "a.b", "run of é", "~", "-rf"])
def test_plain_names_stay_in_the_folder(run: str, tmp_path: Path) -> None:
    check_name(run)
    mirror = Mirror(tmp_path / run)
    mirror.close()
    assert [path.name for path in tmp_path.iterdir()] == [run]


def test_what_cannot_be_trusted_read_or_stored_is_a_dead_letter_and_the_rest_is_stored(
    tmp_path: Path,
) -> None:
    bus, telling = InProcessBus(), Telling()
    health = HealthMessage(service="train", state="running", pid=1, host="here")
    far = EventRecord(time_seconds=0.0, epoch=0, step=1 << 63, event=SKIPPED)
    timeless = EventRecord(time_seconds=float("nan"), epoch=0, step=0, event=SKIPPED)
    (forged,) = telling.sealed(TELEMETRY, *events(1))
    empty = (b"%016d-5-4" % 0, b"run", b"0", b'{"kind":"bundle","messages":[]}')
    signature = KEYRING.signature(b"%s.%s.%s.%s" % empty).encode()
    folder = tmp_path / "deep" / "runs"
    with routing(bus, folder) as router:
        bus.publish(
            TELEMETRY,
            [
                forged[:-1] + b" ",
                b"no message",
                b"esper1 %s %s %s %s\n%s" % (*empty[:3], signature, empty[3]),
                *telling.sealed(TELEMETRY, began()),
                Sealer(OTHER_KEYRING, "run").seal(body_of(events(2)[0]))[1],
                *telling.sealed(TELEMETRY, health, EventMessage(record=far)),
                *telling.sealed(TELEMETRY, EventMessage(record=timeless), began(1 << 64)),
                *telling.sealed(TELEMETRY, *events(3)),
                *(Telling(run).sealed(TELEMETRY, *events(1))[0] for run in ODD_RUNS),
            ],
        )
        wait_for(lambda: router.facts().refused == 8 + len(ODD_RUNS))
    assert router.facts().stored == 2
    assert steps_in(folder / "run") == [3]
    kinds = [reason.partition(":")[0] for reason in reasons(bus)]
    assert sorted(kinds) == sorted(
        [
            *2 * ["bad_signature"],
            "malformed",
            *5 * ["unknown_body"],
            *len(ODD_RUNS) * ["wrong_run"],
        ]
    )
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["deep", "runs", "run"]


def test_of_many_runs_few_are_open_and_all_are_stored(tmp_path: Path) -> None:
    bus = InProcessBus()
    tellings = [Telling(f"run-{number}") for number in range(12)]
    most = 0
    with routing(bus, tmp_path, max_open=3) as router:
        for step in range(5):
            for telling in tellings:
                bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(step)))
            wait_for(lambda step=step: router.facts().stored == 12 * (step + 1))
            most = max(most, router.facts().runs)
            links = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
            databases = {path for path in links if path.name == "run.sqlite"}
            assert len({path for path in databases if tmp_path in path.parents}) <= 3
    assert most == 3
    assert all(steps_in(tmp_path / f"run-{number}") == [*range(5)] for number in range(12))


def test_an_emergency_overtakes_what_waits_to_be_stored(tmp_path: Path) -> None:
    bus, telling = InProcessBus(), Telling()
    bus.publish(TELEMETRY, telling.sealed(TELEMETRY, began(), *events(*range(20_000))))
    bus.publish(EMERGENCY, telling.sealed(EMERGENCY, began(), *events(20_000, critical=True)))
    with routing(bus, tmp_path) as router:
        wait_for(lambda: router.facts().stored == 20_003, seconds=60.0)
    assert steps_in(tmp_path / "run").index(20_000) <= 1000


def test_a_mirror_whose_folder_somebody_removes_is_made_anew(tmp_path: Path) -> None:
    bus, telling = InProcessBus(), Telling()
    with routing(bus, tmp_path) as router:
        bus.publish(TELEMETRY, telling.sealed(TELEMETRY, began(), *events(1)))
        wait_for(lambda: router.facts().stored == 2)
        (tmp_path / "run").rename(tmp_path / "away")
        bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(2)))
        wait_for(lambda: router.facts().stored == 3)
    assert steps_in(tmp_path / "run") == [2]
    assert missed_in(tmp_path / "run") == 2
    assert steps_in(tmp_path / "away") == [1]


@pytest.mark.parametrize("kept", [(), (1,)], ids=["gone", "another"])
def test_a_run_is_passed_over_only_as_long_as_that_folder_is_there(
    kept: tuple[int, ...], tmp_path: Path
) -> None:
    bus, telling, folder = InProcessBus(), Telling(), tmp_path / "run"
    if kept:
        mirror = Mirror(folder)
        mirror.take(telling.told(TELEMETRY, *events(*kept)))
        mirror.close()
        folder.rename(tmp_path / "kept")
    folder.mkdir()
    with routing(bus, tmp_path) as router:
        bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(2)))
        wait_for(lambda: router.facts().passed_over == 1)
        folder.rename(tmp_path / "away")
        if kept:
            (tmp_path / "kept").rename(folder)
        bus.publish(TELEMETRY, telling.sealed(TELEMETRY, *events(3)))
        wait_for(lambda: router.facts().stored == 1, seconds=5.0)
        assert router.facts() == RouterFacts(passed_over=1, stored=1, missed=1, runs=1)
    assert steps_in(folder) == [*kept, 3]


def test_a_damaged_mirror_leaves_no_other_one_open(tmp_path: Path) -> None:
    mirrors = Mirrors(tmp_path)
    for run in ("first", "damaged", "last"):
        mirrors.take(run, Telling(run).told(TELEMETRY, *events(1)))
    (tmp_path / "damaged" / "run.sqlite").write_bytes(b"damaged" * 2000)
    with pytest.raises(sqlite3.DatabaseError):
        mirrors.close()
    assert not any(is_written(folder) for folder in tmp_path.iterdir())


def test_what_a_killed_router_was_making_is_made_anew(tmp_path: Path) -> None:
    making = _making(tmp_path / "run")
    making.mkdir()
    (making / "config.json").write_text("{")
    Mirror(tmp_path / "run", began(task="digits")).close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert RunReader(tmp_path / "run").config() == {"task": "digits"}


def test_a_folder_that_is_no_mirror_is_never_opened_as_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(NoMirrorError, match="is there already"):
        Mirror(tmp_path / "run")
    (tmp_path / "run" / "run.sqlite").write_bytes(b"no database, but as long as a page has to be")
    with pytest.raises(sqlite3.DatabaseError):
        Mirror(tmp_path / "run")


def test_of_several_messages_in_one_envelope_each_is_stored_once(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "run")
    sealer = Sealer(KEYRING, "run")

    def bundle(*messages: Message) -> Told:
        sealed = sealer.seal(bundle_of([body_of(one) for one in messages]), messages=len(messages))
        envelope = open_envelope(sealed[1], KEYRING)
        return Told(stream=TELEMETRY, envelope=envelope, message=message_in(envelope))

    values = MetricsMessage(epoch=1, step=2, metrics={"loss": 1.0})
    first, lost, last = bundle(*events(1, 2), values), bundle(*events(3, 4)), bundle(*events(5, 6))
    assert mirror.take([first, last]) == Taken(stored=5, again=0, missed=2)
    assert mirror.take([first]) == Taken(stored=0, again=3, missed=0)
    assert mirror.take([lost]) == Taken(stored=2, again=0, missed=-2)
    mirror.close()
    assert steps_in(tmp_path / "run") == [1, 2, 5, 6, 3, 4]
    assert [row.value for row in RunReader(tmp_path / "run").metrics()] == [1.0]
