"""Both transports do the same: what a `Bus` promises, in this process and by a real Redis."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from esper.bus import (
    DEAD_LETTERS,
    MAX_DELIVERIES,
    Bus,
    DeadLetter,
    Delivery,
    InProcessBus,
    Stream,
    Subscription,
)
from esper.bus.bus import entry_order
from esper.bus.redis_streams import RedisBus
from redis_server import RedisServer

KEPT = Stream(name="kept", max_length=None)
BOUNDED = Stream(name="bounded", max_length=5)
LONG_SECONDS = 10.0
"""That something may take which happens."""
ANY_BYTES = bytes(range(256)) + b"\r\n\x00"


@dataclass
class Transport:
    """A bus, and how time passes for it."""

    bus: Bus
    advance: Callable[[float], None] | None = None
    """By seconds; None where it is real time."""
    idle_seconds: float = 0.1

    def subscribe(
        self,
        stream: Stream = KEPT,
        group: str = "group",
        consumer: str = "one",
        idle_seconds: float = 3600.0,
    ) -> Subscription:
        return self.bus.subscribe(stream, group=group, consumer=consumer, idle_seconds=idle_seconds)

    def overdue(self, reader: Subscription, limit: int = 100) -> Sequence[Delivery]:
        """Receive what nobody has acknowledged for the idle time."""
        if self.advance is None:
            return reader.receive(limit=limit, wait_seconds=LONG_SECONDS)
        self.advance(self.idle_seconds)
        return reader.receive(limit=limit, wait_seconds=0.0)

    def received_within(self, reader: Subscription, seconds: float) -> Sequence[Delivery]:
        """Receive once, after so much time or during it."""
        if self.advance is not None:
            self.advance(seconds)
            seconds = 0.0
        return reader.receive(limit=100, wait_seconds=seconds)

    def dead_letters(self) -> list[DeadLetter]:
        return dead_letters(self.bus)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@contextmanager
def on_redis(server: RedisServer) -> Iterator[RedisBus]:
    """Connect to an empty server."""
    with server.client() as client:
        client.flushall()
    bus = RedisBus(server.url)
    try:
        yield bus
    finally:
        bus.close()


@pytest.fixture(params=["in process", pytest.param("redis", marks=pytest.mark.redis)])
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    if request.param == "redis":
        with on_redis(request.getfixturevalue("server")) as bus:
            yield Transport(bus)
        return
    now = [1000.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    yield Transport(InProcessBus(clock=lambda: now[0]), advance)


def dead_letters(bus: Bus) -> list[DeadLetter]:
    found = bus.after(DEAD_LETTERS, None, limit=1000, wait_seconds=0.0)
    return [DeadLetter.model_validate_json(delivery.message) for delivery in found]


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def messages(deliveries: Sequence[Delivery]) -> list[bytes]:
    return [delivery.message for delivery in deliveries]


def entries(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.entry for delivery in deliveries]


def test_messages_arrive_as_they_were_and_in_their_order(transport: Transport) -> None:
    sent = [ANY_BYTES, b"", *numbered(2500)]
    published = transport.bus.publish(KEPT, sent)
    reader = transport.subscribe()
    found = reader.receive(limit=3000, wait_seconds=0.0)
    assert messages(found) == sent
    assert entries(found) == list(published) == sorted(published, key=entry_order)
    assert {delivery.deliveries for delivery in found} == {1}
    assert transport.bus.publish(KEPT, []) == []


def test_each_group_gets_every_message_and_one_consumer_of_it_each(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(10))
    readers = [
        transport.subscribe(group=group, consumer=consumer)
        for group in ("a", "b")
        for consumer in ("one", "two")
    ]
    got: list[list[bytes]] = [[], [], [], []]
    for _ in range(4):
        for index, reader in enumerate(readers):
            got[index] += messages(reader.receive(limit=2, wait_seconds=0.0))
    for first, second in (got[:2], got[2:]):
        assert first
        assert second
        assert sorted(first + second) == numbered(10)
    assert transport.dead_letters() == []


def test_a_group_begins_with_the_oldest_message_and_a_member_goes_on(transport: Transport) -> None:
    transport.bus.publish(KEPT, [b"before"])
    first = transport.subscribe()
    transport.bus.publish(KEPT, [b"after"])
    assert messages(first.receive(limit=1, wait_seconds=0.0)) == [b"before"]
    second = transport.subscribe(consumer="two")
    assert messages(second.receive(limit=9, wait_seconds=0.0)) == [b"after"]


def test_what_a_vanished_consumer_held_goes_to_another_one_once(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(4))
    vanished = transport.subscribe(consumer="vanished")
    held = vanished.receive(limit=3, wait_seconds=0.0)
    vanished.acknowledge(entries(held)[:1])
    other = transport.subscribe(consumer="other", idle_seconds=transport.idle_seconds)
    found = [*other.receive(limit=1, wait_seconds=0.0)]
    assert messages(found) == [b"3"]
    other.acknowledge(entries(found))
    taken = transport.overdue(other)
    assert messages(taken) == [b"1", b"2"]
    assert [delivery.deliveries for delivery in taken] == [2, 2]
    other.acknowledge(entries(taken))
    other.reclaim()
    assert other.receive(limit=9, wait_seconds=0.0) == []


def test_what_is_overdue_comes_before_what_is_new(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(3))
    idle = transport.idle_seconds
    reader = transport.subscribe(idle_seconds=idle)
    reader.receive(limit=2, wait_seconds=0.0)
    if transport.advance is None:
        # Time passes on the server while it waits for a stream that stays empty
        empty = Stream(name="empty", max_length=None)
        transport.bus.after(empty, None, limit=1, wait_seconds=2.0 * idle)
    assert messages(transport.overdue(reader, limit=1)) == [b"0"]
    assert messages(reader.receive(limit=1, wait_seconds=0.0)) == [b"1"]


def test_a_renewed_message_is_nobody_elses_and_no_further_delivery(transport: Transport) -> None:
    transport.bus.publish(KEPT, [b"long work"])
    idle = 1.0
    worker = transport.subscribe(consumer="worker", idle_seconds=idle)
    other = transport.subscribe(consumer="other", idle_seconds=idle)
    [held] = worker.receive(limit=1, wait_seconds=0.0)
    for _ in range(6):
        assert transport.received_within(other, 0.3 * idle) == []
        worker.renew([held.entry])
    [taken] = transport.received_within(other, LONG_SECONDS)
    assert (taken.entry, taken.deliveries) == (held.entry, 2)
    other.acknowledge([taken.entry])
    worker.renew([held.entry])
    worker.reclaim()
    assert worker.receive(limit=9, wait_seconds=0.0) == []


def test_a_message_is_a_dead_letter_after_exactly_five_deliveries(transport: Transport) -> None:
    [entry] = transport.bus.publish(KEPT, [ANY_BYTES])
    readers = [
        transport.subscribe(consumer=name, idle_seconds=transport.idle_seconds)
        for name in ("one", "two")
    ]
    for deliveries in range(1, MAX_DELIVERIES + 1):
        assert transport.dead_letters() == []
        reader = readers[deliveries % 2]
        [found] = transport.overdue(reader)
        assert (found.entry, found.message, found.deliveries) == (entry, ANY_BYTES, deliveries)
    assert transport.received_within(readers[0], 5.0 * transport.idle_seconds) == []
    [letter] = transport.dead_letters()
    assert (letter.stream, letter.entry, letter.deliveries) == ("kept", entry, MAX_DELIVERIES)
    assert "nobody has acknowledged it in 5 deliveries" in letter.reason
    assert letter.content == ANY_BYTES
    assert abs(letter.time_seconds - time.time()) < 60.0
    readers[1].reclaim()
    assert readers[1].receive(limit=9, wait_seconds=0.0) == []


def test_a_refused_message_is_a_dead_letter_at_once_and_never_comes_again(
    transport: Transport,
) -> None:
    transport.bus.publish(KEPT, [b"bad", b"good"])
    reader = transport.subscribe()
    bad, good = reader.receive(limit=2, wait_seconds=0.0)
    reader.refuse(bad, "it is bad")
    [letter] = transport.dead_letters()
    assert (letter.entry, letter.deliveries, letter.reason) == (bad.entry, 1, "it is bad")
    assert letter.content == b"bad"
    reader.reclaim()
    assert entries(reader.receive(limit=9, wait_seconds=0.0)) == [good.entry]


def test_a_bounded_stream_keeps_exactly_the_newest(transport: Transport) -> None:
    published = transport.bus.publish(BOUNDED, numbered(12))
    assert (
        messages(transport.bus.after(BOUNDED, None, limit=99, wait_seconds=0.0))
        == (numbered(12)[7:])
    )
    assert messages(transport.bus.after(BOUNDED, published[0], limit=2, wait_seconds=0.0)) == (
        [b"7", b"8"]
    )


def test_what_was_trimmed_is_gone_even_if_somebody_holds_it(transport: Transport) -> None:
    transport.bus.publish(BOUNDED, numbered(5))
    reader = transport.subscribe(BOUNDED)
    held = reader.receive(limit=3, wait_seconds=0.0)
    transport.bus.publish(BOUNDED, [b"5", b"6"])
    reader.reclaim()
    found = reader.receive(limit=2, wait_seconds=0.0)
    assert messages(found) == [b"2"]
    assert messages(reader.receive(limit=2, wait_seconds=0.0)) == [b"3", b"4"]
    reader.acknowledge(entries(held))
    reader.renew(entries(held))
    assert transport.dead_letters() == []


def test_a_stream_without_a_bound_is_never_trimmed(transport: Transport) -> None:
    for begin in range(0, 20_000, 5_000):
        transport.bus.publish(KEPT, numbered(20_000)[begin : begin + 5_000])
    assert messages(transport.bus.after(KEPT, None, limit=50_000, wait_seconds=0.0)) == (
        numbered(20_000)
    )


def test_looking_at_a_stream_takes_nothing_from_anybody(transport: Transport) -> None:
    published = transport.bus.publish(KEPT, numbered(5))
    assert transport.bus.latest(BOUNDED, limit=3) == []
    newest = transport.bus.latest(KEPT, limit=3)
    assert messages(newest) == [b"2", b"3", b"4"]
    assert {delivery.deliveries for delivery in newest} == {0}
    some = transport.bus.after(KEPT, published[1], limit=2, wait_seconds=0.0)
    assert messages(some) == [b"2", b"3"]
    assert transport.bus.after(KEPT, published[4], limit=2, wait_seconds=0.0) == []
    reader = transport.subscribe()
    assert messages(reader.receive(limit=9, wait_seconds=0.0)) == numbered(5)


def test_who_waits_is_woken_by_a_message(transport: Transport) -> None:
    reader = transport.subscribe()
    found: dict[str, Sequence[Delivery]] = {}
    waits = {
        "receive": lambda: reader.receive(limit=5, wait_seconds=60.0),
        "after": lambda: transport.bus.after(KEPT, None, limit=5, wait_seconds=60.0),
    }

    def wait(name: str) -> None:
        found[name] = waits[name]()

    threads = [threading.Thread(target=wait, args=(name,)) for name in waits]
    for thread in threads:
        thread.start()
    transport.bus.publish(KEPT, [b"wake up"])
    for thread in threads:
        thread.join(LONG_SECONDS)
    assert {name: messages(deliveries) for name, deliveries in found.items()} == {
        "receive": [b"wake up"],
        "after": [b"wake up"],
    }


def test_who_waits_in_vain_waits_as_long_as_told(transport: Transport) -> None:
    reader = transport.subscribe()
    for wait in (
        lambda: reader.receive(limit=5, wait_seconds=0.2),
        lambda: transport.bus.after(KEPT, None, limit=5, wait_seconds=0.2),
    ):
        began = time.monotonic()
        assert wait() == []
        assert 0.2 <= time.monotonic() - began < LONG_SECONDS


def test_many_threads_publish_at_once_each_in_its_order(transport: Transport) -> None:
    def publish(writer: int) -> None:
        for number in range(50):
            transport.bus.publish(KEPT, [b"%d %d" % (writer, 2 * number + at) for at in (0, 1)])

    threads = [threading.Thread(target=publish, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = transport.subscribe().receive(limit=2000, wait_seconds=0.0)
    by_writer: dict[int, list[int]] = {writer: [] for writer in range(8)}
    for message in messages(found):
        writer, number = message.split()
        by_writer[int(writer)].append(int(number))
    assert by_writer == {writer: list(range(100)) for writer in range(8)}


def test_a_group_of_many_threads_receives_each_message_once(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(500))
    got: list[bytes] = []

    def consume(name: str) -> None:
        reader = transport.subscribe(consumer=name)
        while found := reader.receive(limit=7, wait_seconds=0.0):
            got.extend(messages(found))
            reader.acknowledge(entries(found))

    threads = [threading.Thread(target=consume, args=(f"{index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(numbered(500))


def test_reclaiming_takes_all_that_others_hold_however_short(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(7))
    before = transport.subscribe(consumer="before")
    assert len(before.receive(limit=5, wait_seconds=0.0)) == 5
    again = transport.subscribe(consumer="again")
    assert messages(again.receive(limit=1, wait_seconds=0.0)) == [b"5"]
    again.reclaim()
    parts = [again.receive(limit=4, wait_seconds=0.0) for _ in range(4)]
    assert [messages(part) for part in parts] == [
        [b"0", b"1", b"2", b"3"],
        [b"4", b"5"],
        [b"6"],
        [],
    ]
    assert [delivery.deliveries for delivery in parts[0]] == [2, 2, 2, 2]


def test_who_leaves_leaves_what_it_holds_to_others(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(2))
    leaving = transport.subscribe(consumer="leaving")
    [held] = leaving.receive(limit=1, wait_seconds=0.0)
    leaving.close()
    other = transport.subscribe(consumer="other")
    other.reclaim()
    [taken] = other.receive(limit=1, wait_seconds=0.0)
    assert (taken.entry, taken.deliveries) == (held.entry, 2)
    assert messages(other.receive(limit=1, wait_seconds=0.0)) == [b"1"]


def test_reclaiming_takes_nothing_that_somebody_receives_afterwards(transport: Transport) -> None:
    transport.bus.publish(KEPT, numbered(3))
    holder, other = transport.subscribe(consumer="holder"), transport.subscribe(consumer="other")
    holder.receive(limit=2, wait_seconds=0.0)
    other.reclaim()
    assert messages(other.receive(limit=2, wait_seconds=0.0)) == numbered(2)
    assert messages(holder.receive(limit=1, wait_seconds=0.0)) == [b"2"]
    assert other.receive(limit=9, wait_seconds=0.0) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_returns_nothing_is_a_mistake(transport: Transport, limit: int) -> None:
    reader = transport.subscribe()
    for ask in (
        lambda: reader.receive(limit=limit, wait_seconds=0.0),
        lambda: transport.bus.latest(KEPT, limit=limit),
        lambda: transport.bus.after(KEPT, None, limit=limit, wait_seconds=0.0),
    ):
        with pytest.raises(ValueError, match=f"must be 1 or more, got {limit}"):
            ask()
    with pytest.raises(ValueError, match="an entry is written NUMBER-NUMBER, got '\\$'"):
        transport.bus.after(KEPT, "$", limit=1, wait_seconds=0.0)


GROUPS = ("a", "b")
PLACES = [
    (stream, group, consumer)
    for stream in (KEPT, BOUNDED)
    for group in GROUPS
    for consumer in ("patient", "greedy")
]
"""A patient consumer takes nothing that others hold, a greedy one everything."""


class BothTransports(RuleBasedStateMachine):
    """Does the same with both, and compares what comes of it."""

    def __init__(self, bus: RedisBus) -> None:
        super().__init__()
        self.buses: tuple[Bus, Bus] = (InProcessBus(clock=lambda: 0.0), bus)
        self.readers: dict[tuple[Stream, str, str], tuple[Subscription, Subscription]] = {}
        self.held: list[tuple[tuple[Stream, str, str], tuple[Delivery, Delivery]]] = []
        self.entries: dict[str, dict[str, int]] = {KEPT.name: {}, BOUNDED.name: {}}
        """What number a message has in its stream, by its entries in both."""

    @initialize()
    def begin(self) -> None:
        for place in PLACES:
            self.subscribe(place)
        for stream in (KEPT, BOUNDED):
            self.publish(stream, 5)

    @rule(place=st.sampled_from(PLACES))
    def subscribe(self, place: tuple[Stream, str, str]) -> None:
        stream, group, consumer = place
        idle = 0.0 if consumer == "greedy" else 3600.0
        first, second = (
            bus.subscribe(stream, group=group, consumer=consumer, idle_seconds=idle)
            for bus in self.buses
        )
        self.readers[place] = (first, second)

    @rule(stream=st.sampled_from([KEPT, BOUNDED]), count=st.integers(1, 7))
    def publish(self, stream: Stream, count: int) -> None:
        known = self.entries[stream.name]
        begin = len(known) // 2
        sent = [b"%d" % (begin + index) for index in range(count)]
        for bus in self.buses:
            for index, entry in enumerate(bus.publish(stream, sent)):
                known[entry] = begin + index

    @rule(data=st.data(), limit=st.integers(1, 6))
    def receive(self, data: st.DataObject, limit: int) -> None:
        place = data.draw(st.sampled_from(list(self.readers)))
        first, second = (
            reader.receive(limit=limit, wait_seconds=0.0) for reader in self.readers[place]
        )
        assert self.plain(place[0], first) == self.plain(place[0], second)
        self.held += [(place, pair) for pair in zip(first, second, strict=True)]

    @rule(data=st.data(), what=st.sampled_from(["acknowledge", "renew", "refuse"]))
    def settle(self, data: st.DataObject, what: str) -> None:
        """Of what was received once, perhaps long ago and by a reader that has lost it since."""
        if not self.held:
            return
        place, pair = data.draw(st.sampled_from(self.held[-12:]))
        for reader, delivery in zip(self.readers[place], pair, strict=True):
            if what == "acknowledge":
                reader.acknowledge([delivery.entry])
            elif what == "renew":
                reader.renew([delivery.entry])
            else:
                reader.refuse(delivery, "drawn")

    @rule(data=st.data(), leave=st.booleans())
    def reclaim_or_leave(self, data: st.DataObject, leave: bool) -> None:
        place = data.draw(st.sampled_from(list(self.readers)))
        for reader in self.readers[place]:
            reader.close() if leave else reader.reclaim()
        if leave:
            self.subscribe(place)

    @rule(data=st.data(), stream=st.sampled_from([KEPT, BOUNDED]), limit=st.integers(1, 9))
    def look(self, data: st.DataObject, stream: Stream, limit: int) -> None:
        first, second = (bus.latest(stream, limit=limit) for bus in self.buses)
        assert self.plain(stream, first) == self.plain(stream, second)
        count = len(self.entries[stream.name]) // 2
        number = data.draw(st.none() | st.integers(0, max(0, count - 1)))
        known = {
            (found, entry.endswith("-0") and len(entry) < 10): entry
            for entry, found in self.entries[stream.name].items()
        }
        begins = [None, None] if number is None or not count else [known[number, True], None]
        if number is not None and count:
            begins[1] = known[number, False]
        first, second = (
            bus.after(stream, begin, limit=limit, wait_seconds=0.0)
            for bus, begin in zip(self.buses, begins, strict=True)
        )
        assert self.plain(stream, first) == self.plain(stream, second)

    @rule()
    def compare_dead_letters(self) -> None:
        first, second = (
            [
                (
                    *(letter.stream, self.entries[letter.stream][letter.entry]),
                    *(letter.deliveries, letter.reason, letter.content),
                )
                for letter in dead_letters(bus)
            ]
            for bus in self.buses
        )
        assert first == second

    def teardown(self) -> None:
        self.compare_dead_letters()

    def plain(self, stream: Stream, deliveries: Sequence[Delivery]) -> list[tuple[object, ...]]:
        known = self.entries[stream.name]
        return [
            (known[delivery.entry], delivery.message, delivery.deliveries)
            for delivery in deliveries
        ]


@pytest.mark.redis
def test_both_transports_do_the_same_whatever_is_done_with_them(server: RedisServer) -> None:
    def both() -> BothTransports:
        with server.client() as client:
            client.flushall()
        return BothTransports(bus)

    bus = RedisBus(server.url)
    try:
        run_state_machine_as_test(
            both, settings=settings(max_examples=100, stateful_step_count=50, deadline=None)
        )
    finally:
        bus.close()
