"""Telemetry never holds up a run, comes in order, and what is lost is counted."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bus_machinery import (
    KEYRING,
    PRUNED,
    SKIPPED,
    GatedBus,
    envelopes,
    files_of_at_most,
    record,
    told,
    wait_for,
)
from esper.bus.bus import EMERGENCY, TELEMETRY, Stream
from esper.bus.envelope import Sealer
from esper.bus.link_state import LinkState
from esper.bus.messages import (
    EventMessage,
    MetricsMessage,
    RunMessage,
    StatusMessage,
)
from esper.bus.sequences import SequenceTracker
from esper.bus.spool import Spool
from esper.bus.telemetry_lane import TelemetryLane
from esper.bus.telemetry_link import TelemetryLink
from esper.lifecycle.events import BusLost, BusRegained, RunWentBack, StepSkipped

Open = Callable[..., TelemetryLink]


@pytest.fixture
def bus() -> Iterator[GatedBus]:
    made = GatedBus()
    yield made
    made.gate.set()


@pytest.fixture
def open_link(bus: GatedBus, tmp_path: Path) -> Iterator[Open]:
    links: list[TelemetryLink] = []

    def make(**options: Any) -> TelemetryLink:
        options = {"folder": tmp_path, "link": LinkState(), **options}
        links.append(TelemetryLink(bus, KEYRING, "run", **options))
        return links[-1]

    yield make
    for link in links:
        link.close(limit_seconds=0.1)


def steps_told(bus: GatedBus, stream: Stream) -> list[int]:
    return [
        message.record.step for message in told(bus, stream) if isinstance(message, EventMessage)
    ]


def missing_in(bus: GatedBus, stream: Stream) -> tuple[int, int]:
    """Return how many of a stream's messages are missing and how many came twice."""
    tracker, twice = SequenceTracker(), 0
    for envelope in envelopes(bus, stream):
        if not tracker.take(envelope.producer, envelope.numbers):
            twice += len(envelope.numbers)
    return tracker.missing, twice


def test_emergencies_and_the_rest_go_their_own_ways_in_order(
    bus: GatedBus, open_link: Open
) -> None:
    link = open_link()
    link.begin({"task": "digits"}, {"device": "cpu"}, -1)
    metrics = {"loss": 1.0}
    link.publish(record(1))
    link.measure(1, 2, metrics)
    metrics["loss"] = 2.0
    link.publish(record(2, SKIPPED))
    link.publish(record(3))
    back = record(4, RunWentBack(from_step=4, to_step=2, same_batches=True))
    link.publish(back)  # an emergency, and behind all that it revokes
    link.flush()
    link.end("finished")
    assert link.close() == 0
    began = RunMessage(config={"task": "digits"}, environment={"device": "cpu"}, after_step=-1)
    assert told(bus, EMERGENCY) == [
        began,
        EventMessage(record=record(2, SKIPPED)),
    ]
    assert told(bus, TELEMETRY) == [
        began,
        EventMessage(record=record(1)),
        MetricsMessage(epoch=1, step=2, metrics={"loss": 1.0}),
        EventMessage(record=record(3)),
        EventMessage(record=back),
        StatusMessage(status="finished"),
    ]
    for stream in (EMERGENCY, TELEMETRY):
        sealed = envelopes(bus, stream)
        numbers = [number for envelope in sealed for number in envelope.numbers]
        assert numbers == [*range(1, len(told(bus, stream)) + 1)]
        assert len({envelope.producer for envelope in sealed}) == 1
        assert {envelope.run for envelope in sealed} == {"run"}


def test_a_bus_that_does_not_answer_holds_up_nobody_and_the_oldest_normal_ones_make_room(
    bus: GatedBus, open_link: Open
) -> None:
    bus.gate.clear()
    link = open_link(max_queued=1000)
    link.begin({}, {}, -1)
    wait_for(lambda: bus.calls == 1)
    seconds = []
    for step in range(10_000):
        began = time.perf_counter()
        link.publish(record(step))
        link.measure(1, step, {"loss": 1.0})
        if step % 100 == 0:
            link.publish(record(step, SKIPPED))
        seconds.append(time.perf_counter() - began)
    assert sum(seconds) < 2.0
    bus.gate.set()
    assert link.close() == 0
    assert told(bus, TELEMETRY)[0].kind == "run"
    assert steps_told(bus, TELEMETRY) == [*range(9501, 10_000)]
    assert steps_told(bus, EMERGENCY) == [*range(0, 10_000, 100)]
    assert missing_in(bus, TELEMETRY) == (1 + 20_000 - 1000, 0)
    assert missing_in(bus, EMERGENCY) == (0, 0)


def test_an_emergency_waits_for_no_more_than_one_batch_of_others(
    bus: GatedBus, open_link: Open
) -> None:
    bus.gate.clear()
    link = open_link()
    link.begin({}, {}, -1)
    for step in range(5000):
        link.publish(record(step))
    wait_for(lambda: bus.calls == 1)
    link.publish(record(5000, SKIPPED))
    order = []
    publish = bus.publish
    bus.publish = lambda stream, messages: (order.append(stream.name), publish(stream, messages))[1]
    bus.gate.set()
    assert link.close() == 0
    assert order[:2] in (["emergency", "telemetry"], ["telemetry", "emergency"])
    assert order.count("emergency") == 1
    assert order.count("telemetry") >= 10


def test_what_is_told_while_the_bus_is_away_comes_in_order_when_it_is_back(
    bus: GatedBus, open_link: Open, tmp_path: Path
) -> None:
    state = LinkState()
    link = open_link(link=state)
    link.begin({}, {}, -1)
    link.publish(record(0))
    link.flush()
    wait_for(lambda: steps_told(bus, TELEMETRY) == [0])
    bus.away = True
    for step in range(1, 2000):
        link.publish(record(step))
        if step % 10 == 0:
            link.publish(record(step, SKIPPED))
    wait_for(lambda: state.has_events)
    (lost,) = state.take_events()
    assert isinstance(lost, BusLost)
    assert lost.error == "the bus is away"
    wait_for(lambda: sum(path.stat().st_size for path in spooled(tmp_path)) > 300_000)
    assert not state.has_events
    bus.away = False
    back = time.monotonic()
    wait_for(lambda: state.has_events)
    assert time.monotonic() - back < 5.0
    link.publish(record(2000))
    assert link.close() == 0
    (regained,) = state.take_events()
    assert isinstance(regained, BusRegained)
    assert regained.lost_messages == 0
    assert steps_told(bus, TELEMETRY) == [*range(2001)]
    assert steps_told(bus, EMERGENCY) == [*range(10, 2000, 10)]
    assert missing_in(bus, TELEMETRY) == missing_in(bus, EMERGENCY) == (0, 0)
    assert spooled(tmp_path) == []


def spooled(folder: Path) -> list[Path]:
    return [*folder.rglob("*.spool")]


def test_a_batch_that_arrived_in_part_comes_again_with_the_same_ids(
    bus: GatedBus, open_link: Open
) -> None:
    link = open_link()
    link.begin({}, {}, -1)
    link.flush()
    wait_for(lambda: len(told(bus, TELEMETRY)) == 1)
    bus.breaks_after = 2
    for step in range(100):
        link.publish(record(step))
    link.flush()
    wait_for(lambda: bool(steps_told(bus, TELEMETRY)))
    wait_for(lambda: steps_told(bus, TELEMETRY)[-1] == 99)
    assert link.close() == 0
    arrived = [len(envelope.numbers) for envelope in envelopes(bus, TELEMETRY)]
    assert missing_in(bus, TELEMETRY) == (0, sum(arrived[1:3]))
    assert len(arrived) < 20, "several events are in one envelope"


def test_a_run_that_ends_while_the_bus_hangs_keeps_all_and_the_next_attempt_sends_it_first(
    bus: GatedBus, open_link: Open
) -> None:
    bus.gate.clear()
    link = open_link()
    link.begin({}, {}, -1)
    wait_for(lambda: bus.calls == 1)
    for step in range(1500):
        link.publish(record(step))
    link.publish(record(1500, SKIPPED))
    link.end("interrupted")
    began = time.monotonic()
    assert link.close(limit_seconds=0.3) == 2 + 1500 + 1 + 1
    assert time.monotonic() - began < 3.0
    bus.gate.set()
    wait_for(lambda: len(told(bus, EMERGENCY)) == 1)  # the thread that hung finds that it is over
    again = open_link()
    again.begin({}, {}, 700)
    again.publish(record(701))
    assert again.close() == 0
    kinds = [message.kind for message in told(bus, TELEMETRY)]
    assert kinds == ["run", *1500 * ["event"], "status", "run", "event"]
    assert steps_told(bus, TELEMETRY) == [*range(1500), 701]
    assert [message.kind for message in told(bus, EMERGENCY)][-3:] == ["run", "event", "run"]
    assert missing_in(bus, EMERGENCY)[0] == missing_in(bus, TELEMETRY)[0] == 0


def test_what_a_full_spool_drops_is_told_and_shows_in_the_sequence(
    bus: GatedBus, open_link: Open, tmp_path: Path
) -> None:
    state = LinkState()
    link = open_link(link=state, max_spool_bytes=200_000)
    link.begin({}, {}, -1)
    link.flush()
    wait_for(lambda: len(told(bus, TELEMETRY)) == 1)
    bus.away = True
    for step in range(5000):
        link.publish(record(step))
        if step % 500 == 0:
            link.publish(record(step, SKIPPED))
    wait_for(lambda: state.has_events)
    assert sum(path.stat().st_size for path in spooled(tmp_path)) <= 400_000
    bus.away = False
    link.flush()
    wait_for(lambda: 4999 in steps_told(bus, TELEMETRY))
    link.close()
    left = steps_told(bus, TELEMETRY)
    assert left == [*range(5000 - len(left), 5000)]
    _, regained = state.take_events()
    assert isinstance(regained, BusRegained)
    assert regained.lost_messages == missing_in(bus, TELEMETRY)[0] == 5000 - len(left) > 1000
    assert steps_told(bus, EMERGENCY) == [*range(0, 5000, 500)]


def test_what_a_full_disk_does_not_take_waits_in_memory_and_comes_in_order(
    bus: GatedBus, open_link: Open
) -> None:
    state = LinkState()
    link = open_link(link=state)
    link.begin({}, {}, -1)
    link.publish(record(0))
    link.flush()
    wait_for(lambda: steps_told(bus, TELEMETRY) == [0])
    bus.away = True
    with files_of_at_most(2000):
        for step in range(1, 1000):
            link.publish(record(step))
            if step % 100 == 0:
                link.publish(record(step, SKIPPED))
        wait_for(lambda: state.has_events)
        link.publish(record(1000))
        bus.away = False
        wait_for(lambda: steps_told(bus, TELEMETRY)[-1] == 1000)
        wait_for(lambda: len(state._events) == 2)
    assert link.close() == 0
    _, regained = state.take_events()
    assert isinstance(regained, BusRegained)
    assert regained.lost_messages == 0
    assert steps_told(bus, TELEMETRY) == [*range(1001)]
    assert steps_told(bus, EMERGENCY) == [*range(100, 1000, 100)]
    assert missing_in(bus, TELEMETRY) == missing_in(bus, EMERGENCY) == (0, 0)


def test_what_waits_for_a_full_disk_and_the_bus_is_bounded_and_counted_exactly(
    tmp_path: Path,
) -> None:
    bus, lost = GatedBus(), 0
    (tmp_path / "spool").touch()  # so that nothing can be kept
    lane = TelemetryLane(
        TELEMETRY, Sealer(KEYRING, "run"), Spool(tmp_path / "spool"), max_queued=1000
    )
    for step in range(5000):
        lane.put(record(step))
        if step % 700 == 0:
            lane.keep()
            assert lane.next_batch()
            lane.keep()
    for _ in range(2):
        bus.publish(TELEMETRY, lane.next_batch())
        lane.sent()
        lost += lane.take_lost()
    arrived = steps_told(bus, TELEMETRY)
    assert arrived == [0, *range(4000, 4500)]
    assert lost == missing_in(bus, TELEMETRY)[0] == 4000 - 1
    lane.keep()
    lane.put(record(5000))
    lane.close()
    assert lane.take_lost() == 501
    assert lane.kept_messages == 0


def test_what_cannot_be_sent_is_left_out_counted_and_told_without_its_values(
    bus: GatedBus, open_link: Open, caplog: pytest.LogCaptureFixture
) -> None:
    link = open_link()
    link.begin({}, {}, -1)
    with caplog.at_level(logging.WARNING, logger="esper"):
        link.publish(record(1, StepSkipped(reason=300_000 * "secret", value=1.0)))
        link.publish(record(2, StepSkipped(reason=300_000 * "secret", value=1.0)))
        link.measure(1, 1, {"loss": "secret"})  # type: ignore[dict-item]
        link.measure(1, 2, {"loss": 1.0})
        link.publish(record(3, SKIPPED))
        assert link.close() == 0
    assert steps_told(bus, EMERGENCY) == [3]
    assert missing_in(bus, EMERGENCY) == (2, 0)
    assert missing_in(bus, TELEMETRY) == (1, 0)
    assert {entry.getMessage() for entry in caplog.records} == {
        "step_skipped cannot be sent: it has 1800161 bytes",
        "tuple cannot be sent: ValidationError",
    }


def test_a_run_that_cannot_be_told_of_is_refused_at_once_and_without_its_values(
    open_link: Open,
) -> None:
    link = open_link()
    with pytest.raises(ValueError, match=r"are not: config\.path") as caught:
        link.begin({"path": object(), "password": "secret"}, {}, -1)
    assert "secret" not in str(caught.value)
    link.begin({"long": 1_000_000 * "x"}, {}, -1)
    with pytest.raises(ValueError, match="config and environment have 1048644 bytes as JSON"):
        link.begin({"long": (1 << 20) * "x"}, {}, -1)


def test_a_normal_event_is_sent_although_nobody_flushes(bus: GatedBus, open_link: Open) -> None:
    link = open_link()
    link.publish(record(1, PRUNED))
    wait_for(lambda: steps_told(bus, TELEMETRY) == [1], seconds=5.0)


def test_an_outage_is_over_although_what_failed_was_lost_and_only_the_rest_is_sent(
    bus: GatedBus, open_link: Open
) -> None:
    state = LinkState()
    link = open_link(link=state, max_spool_bytes=10)  # so that nothing can be kept
    bus.away = True
    link.publish(record(1, SKIPPED))
    wait_for(lambda: state.has_events)
    bus.away = False
    link.publish(record(2))
    wait_for(lambda: steps_told(bus, TELEMETRY) == [2])
    wait_for(lambda: len(state._events) == 2, seconds=5.0)
    lost, regained = state.take_events()
    assert isinstance(lost, BusLost)
    assert isinstance(regained, BusRegained)
    assert regained.lost_messages == 1
