"""A consumer deals with each message until it is done or given up, through errors and outages."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import pytest

from esper.bus import (
    DEAD_LETTERS,
    Bus,
    Consumer,
    DeadLetter,
    Delivery,
    InProcessBus,
    LinkState,
    MessageRefusedError,
    Refusal,
    Stream,
)
from esper.bus.redis_streams import RedisBus
from esper.lifecycle.events import BusLost, BusRegained
from redis_server import RedisServer

KEPT = Stream(name="kept", max_length=None)
LONG_SECONDS = 30.0

DIES = """
import os, sys, threading
from esper.bus import Consumer, Stream
from esper.bus.redis_streams import RedisBus
url, name = sys.argv[1:]
stop = threading.Event()

def die(delivery):
    print(delivery.deliveries, flush=True)
    os._exit(7)

Consumer(
    RedisBus(url), Stream(name="kept", max_length=None),
    group="group", name=name, handle=die, idle_seconds=0.1,
).run(stop)
"""


def consumer(bus: Bus, handle: Callable[[Delivery], object], **options: object) -> Consumer:
    given = {"name": "one", "idle_seconds": 0.05, **options}
    return Consumer(bus, KEPT, group="group", handle=handle, **given)


@contextmanager
def running(subject: Consumer) -> Iterator[threading.Event]:
    """Run it in a thread until the block ends; what it raises is a failure."""
    stop = threading.Event()
    thread = threading.Thread(target=subject.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(LONG_SECONDS)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def letters(bus: Bus) -> list[DeadLetter]:
    found = bus.latest(DEAD_LETTERS, limit=100)
    return [DeadLetter.model_validate_json(delivery.message) for delivery in found]


def left(bus: Bus) -> Sequence[bytes]:
    """Take what the group has not dealt with."""
    reader = bus.subscribe(KEPT, group="group", consumer="looking")
    reader.reclaim()
    old = reader.receive(limit=100, wait_seconds=0.0)
    new = reader.receive(limit=100, wait_seconds=0.0)
    return [delivery.message for delivery in (*old, *new)]


def test_what_the_handler_returns_from_is_acknowledged_after_it_was_made_durable() -> None:
    bus = InProcessBus()
    bus.publish(KEPT, [b"1", b"2", b"3"])
    other = bus.subscribe(KEPT, group="group", consumer="other", idle_seconds=0.0)
    told: list[object] = []
    pending: list[int] = []

    def flush() -> None:
        told.append("flush")
        other.reclaim()
        pending.append(len(other.receive(limit=9, wait_seconds=0.0)))

    with running(consumer(bus, lambda d: told.append(d.message), flush=flush, idle_seconds=30.0)):
        until(lambda: "flush" in told)
    assert told == [b"1", b"2", b"3", "flush"]
    assert pending == [3]
    assert left(bus) == []
    assert letters(bus) == []


def test_what_the_handler_refuses_is_a_dead_letter_with_its_reason() -> None:
    bus = InProcessBus()
    bus.publish(KEPT, [b"bad", b"good", b"bad"])
    taken: list[bytes] = []

    def handle(delivery: Delivery) -> None:
        if delivery.message == b"bad":
            raise MessageRefusedError(Refusal.MALFORMED, "it has no head")
        taken.append(delivery.message)

    with running(consumer(bus, handle)):
        until(lambda: bool(letters(bus)))
    assert taken == [b"good"]
    assert [(letter.content, letter.reason, letter.deliveries) for letter in letters(bus)] == (
        2 * [(b"bad", "malformed: it has no head", 1)]
    )
    assert left(bus) == []


def test_what_fails_is_tried_again_and_given_up_with_its_last_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = InProcessBus()
    bus.publish(KEPT, [b"always", b"once"])
    tries: list[tuple[bytes, int]] = []

    def handle(delivery: Delivery) -> None:
        tries.append((delivery.message, delivery.deliveries))
        if delivery.message == b"always" or delivery.deliveries == 1:
            raise ValueError(f"try {delivery.deliveries}")

    with running(consumer(bus, handle)):
        until(lambda: bool(letters(bus)))
    assert sorted(tries) == [*((b"always", n) for n in range(1, 6)), (b"once", 1), (b"once", 2)]
    [letter] = letters(bus)
    assert letter.content == b"always"
    assert letter.reason == "it failed in 5 deliveries, at last by ValueError: try 5"
    assert left(bus) == []
    assert "message 1-0 of kept failed, delivery 4 of 5: ValueError: try 4" in caplog.text


def test_what_could_not_be_made_durable_is_delivered_again_and_given_up_as_what_fails() -> None:
    bus = InProcessBus()
    bus.publish(KEPT, [b"message"])
    seen: list[int] = []

    def flush() -> None:
        raise OSError("no space left")

    with running(consumer(bus, lambda d: seen.append(d.deliveries), flush=flush)):
        until(lambda: bool(letters(bus)))
    assert seen == [1, 2, 3, 4, 5]
    [letter] = letters(bus)
    assert letter.reason == "it failed in 5 deliveries, at last by OSError: no space left"


def test_stopping_deals_with_what_is_being_handled_and_leaves_the_rest() -> None:
    bus = InProcessBus()
    bus.publish(KEPT, [b"1", b"2", b"3"])
    stops: list[threading.Event] = []
    ready = threading.Event()

    def handle(_: Delivery) -> None:
        ready.wait(LONG_SECONDS)
        stops[0].set()

    with running(consumer(bus, handle, idle_seconds=30.0)) as stop:
        stops.append(stop)
        ready.set()
        until(stop.is_set)
    assert left(bus) == [b"2", b"3"]


def test_what_ends_the_thread_leaves_acknowledged_what_was_done() -> None:
    bus = InProcessBus()
    bus.publish(KEPT, [b"1", b"2", b"3"])

    def handle(delivery: Delivery) -> None:
        if delivery.message == b"2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consumer(bus, handle, idle_seconds=30.0).run(threading.Event())
    assert left(bus) == [b"2", b"3"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("renew")]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(fsync="always") as server:
        yield server


@pytest.mark.redis
def test_nobody_else_gets_what_a_slow_handler_has(server: RedisServer) -> None:
    idle = 1.0
    began, may_end = threading.Event(), threading.Event()

    def handle(_: Delivery) -> None:
        began.set()
        assert may_end.wait(LONG_SECONDS)

    with closing(RedisBus(server.url)) as bus:
        bus.publish(KEPT, [b"slow", b"waits behind it"])
        other = bus.subscribe(KEPT, group="group", consumer="other", idle_seconds=idle)
        with running(consumer(bus, handle, idle_seconds=idle)):
            assert began.wait(LONG_SECONDS)
            assert other.receive(limit=9, wait_seconds=2.5 * idle) == []
            may_end.set()
            until(lambda: left_on(server) == 0)
        assert letters(bus) == []


@pytest.mark.redis
@pytest.mark.slow
def test_what_kills_the_process_five_times_is_a_dead_letter(server: RedisServer) -> None:
    with closing(RedisBus(server.url)) as bus:
        bus.publish(KEPT, [b"deadly"])
        counts = []
        for name in "abcde":
            done = subprocess.run(
                [sys.executable, "-c", DIES, server.url, name],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 7, done.stderr
            counts.append(int(done.stdout))
        assert counts == [1, 2, 3, 4, 5]
        with running(consumer(bus, lambda delivery: pytest.fail("delivered again"))):
            until(lambda: bool(letters(bus)))
        [letter] = letters(bus)
        assert letter.content == b"deadly"
        assert letter.reason == "nobody has acknowledged it in 5 deliveries"


@pytest.mark.redis
@pytest.mark.parametrize("linked", [True, False])
def test_an_outage_is_told_once_and_what_was_done_in_it_comes_never_again(
    server: RedisServer, linked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []
    away, back = threading.Event(), threading.Event()
    link = LinkState() if linked else None

    def handle(delivery: Delivery) -> None:
        seen.append(delivery.message)
        if delivery.message == b"1":
            away.set()
            assert back.wait(LONG_SECONDS)
        if delivery.message == b"2":
            raise MessageRefusedError(Refusal.STALE, "too late")

    with closing(RedisBus(server.url)) as bus:
        bus.publish(KEPT, [b"0", b"1", b"2"])
        with running(consumer(bus, handle, idle_seconds=30.0, link=link)):
            assert away.wait(LONG_SECONDS)
            server.kill()
            back.set()
            told: list[object] = []

            def lost() -> bool:
                told.extend(link.take_events() if link else caplog.messages)
                return bool(told)

            until(lost)
            server.start()
            until(lambda: raises_nothing(lambda: letters(bus)))
            bus.publish(KEPT, [b"3"])
            until(lambda: b"3" in seen and left_on(server) == 0)
        assert seen == [b"0", b"1", b"2", b"3"]
        [letter] = letters(bus)
        assert letter.reason == "stale: too late"
    if link:
        told += link.take_events()
        assert [type(event) for event in told] == [BusLost, BusRegained]
        assert told[0].concern == "kept"
        assert caplog.messages == []
    else:
        lost_text, regained = caplog.messages
        assert "kept failed" in lost_text
        assert regained == "the bus is back: receiving of kept"


@pytest.mark.redis
def test_a_server_that_is_not_there_at_first_is_waited_for(server: RedisServer) -> None:
    with closing(RedisBus(server.url)) as bus:
        bus.publish(KEPT, [b"early"])
        server.kill()
        seen: list[bytes] = []
        link = LinkState()
        with running(consumer(bus, lambda d: seen.append(d.message), link=link)):
            until(lambda: link.has_events)
            server.start()
            until(lambda: seen == [b"early"])


def left_on(server: RedisServer) -> int:
    """Count what is pending."""
    with server.client() as client:
        pending: int = client.xpending("esper:kept", "group")["pending"]
    return pending


def raises_nothing(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True
