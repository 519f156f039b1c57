"""How many signed events a second does the bus carry, and what does that cost a step?

Starts a redis-server of its own, in memory, and shows, round after round by turns,

- publishing: from the first event given to a `TelemetryLink` until Redis has all, dumped, signed
  and numbered, several in an entry; against pipelined XADDs of the same events, dumped and signed
  beforehand, an entry each;
- reading: a `Router` that receives, verifies and parses them, and one that writes them into a run
  folder besides; against XREADGROUP and XACK of an entry each;
- both one after the other, as a rate and as a multiple of the time of the bare calls;
- both at once, by two processes, from the first event published to the last one read;
- memory: what a training process grows by, from 10,000 events to 100,000 that nobody reads, while
  the server is there and while it is not, and how much queue, spool and stream hold then;
- a step: of a small network that publishes an event each, with the server there, and away, against
  one without a bus; blocks of steps by turns, each one's median, their ratio's median over rounds.

    python benchmarks/bus_throughput.py [--events 20000] [--rounds 7] [--steps 200]
"""

import argparse
import gc
import multiprocessing
import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import redis
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from esper.bus.bus import TELEMETRY, BusUnavailableError
from esper.bus.envelope import Sealer
from esper.bus.link_state import LinkState
from esper.bus.messages import EventMessage, body_of
from esper.bus.mirror import Told
from esper.bus.redis_streams import RedisBus
from esper.bus.router import BATCH_MESSAGES, Router
from esper.bus.telemetry_link import SPOOL_FOLDER, TelemetryLink
from esper.lifecycle.events import (
    ContributionMeasured,
    Event,
    EventRecord,
    GradientHealthMeasured,
    StageChanged,
)
from esper.lifecycle.stages import SeedStage
from esper.signing import Keyring

KEYRING = Keyring([b"the benchmark's key of 24 bytes or more"])
KEY = f"esper:{TELEMETRY.name}"
GROUP = "bare"
REMEMBERED = (10_000, 100_000)
"""Events, between which memory is compared."""
EVENTS_PER_STEP = 20
WIDTH = 256

EVENTS: tuple[Event, ...] = (
    GradientHealthMeasured(
        slot="stage2",
        host_norm=1.0301,
        seed_norm=0.4717,
        ratio=0.4579,
        nonfinite_steps=0,
        vanishing=False,
        exploding=False,
    ),
    ContributionMeasured(
        slot="stage2",
        stage=SeedStage.BLENDING,
        loss_with=1.2041,
        loss_without=1.2513,
        contribution_fraction=0.0377,
        standard_error_fraction=0.0102,
    ),
    StageChanged(
        slot="stage2",
        blueprint="conv_light",
        from_stage=SeedStage.TRAINING,
        to_stage=SeedStage.BLENDING,
    ),
)


class Server:
    """A redis-server on a free port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(  # noqa: S603
            [*command, "--dir", str(folder)], stdout=subprocess.DEVNULL
        )
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port, protocol=2)
        bus, end = RedisBus(self.url), time.monotonic() + 30.0
        while True:
            try:
                bus.ping()
                break
            except BusUnavailableError:
                assert time.monotonic() < end
                time.sleep(0.02)
        bus.close()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Verifying(Router):
    """A router that stores nothing of what it has verified and parsed."""

    def _take(self, run: str, told: Sequence[Told]) -> None:
        self._count(stored=sum(len(one.envelope.numbers) for one in told))


def record(number: int) -> EventRecord:
    event = EVENTS[number % len(EVENTS)]
    return EventRecord(time_seconds=time.time(), epoch=number // 100, step=number, event=event)


@contextmanager
def linked(url: str, folder: Path, **options: int) -> Iterator[TelemetryLink]:
    bus = RedisBus(url)
    link = TelemetryLink(bus, KEYRING, "run", folder=folder, link=LinkState(), **options)
    try:
        yield link
    finally:
        link.close(limit_seconds=0.1)
        bus.close()


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def publish_by_link(url: str, folder: Path, records: list[EventRecord]) -> None:
    with linked(url, folder, max_queued=len(records) + 1) as link:
        for one in records:
            link.publish(one)
        assert link.close(limit_seconds=600.0) == 0


def publish_bare(client: redis.Redis, messages: list[bytes]) -> None:
    for begin in range(0, len(messages), BATCH_MESSAGES):
        with client.pipeline(transaction=False) as pipe:
            for message in messages[begin : begin + BATCH_MESSAGES]:
                pipe.xadd(KEY, {b"m": message}, maxlen=TELEMETRY.max_length, approximate=False)
            pipe.execute()


def read_bare(client: redis.Redis, count: int) -> None:
    while count:
        ((_, found),) = client.xreadgroup(GROUP, "bare", {KEY: ">"}, count=BATCH_MESSAGES)
        client.xack(KEY, GROUP, *[entry for entry, _ in found])
        count -= len(found)


def publish_bare_at_once(url: str, messages: list[bytes]) -> float:
    """Publish, in a process of its own; return when that began."""
    client = redis.Redis.from_url(url, protocol=2)
    client.ping()
    began = time.perf_counter()
    publish_bare(client, messages)
    return began


def read_bare_at_once(url: str, count: int) -> float:
    """Read what is being published; return when all has come."""
    client = redis.Redis.from_url(url, protocol=2)
    while count:
        for _, found in client.xreadgroup(GROUP, "bare", {KEY: ">"}, BATCH_MESSAGES, block=1000):
            client.xack(KEY, GROUP, *[entry for entry, _ in found])
            count -= len(found)
    return time.perf_counter()


def publish_by_link_at_once(url: str, folder: Path, events: int) -> float:
    records = [record(number) for number in range(events)]
    gc.collect()
    gc.freeze()
    began = time.perf_counter()
    publish_by_link(url, folder, records)
    gc.unfreeze()
    return began


def read_by_router_at_once(url: str, folder: Path, events: int, kind: type[Router]) -> float:
    bus = RedisBus(url)
    began = time.perf_counter()
    seconds = read_by(kind(bus, KEYRING, folder / "mirrors"), events)
    bus.close()
    return began + seconds


class Processes:
    """One that publishes and one that reads, for all rounds; clocks of both are the machine's."""

    def __init__(self, server: Server) -> None:
        context = multiprocessing.get_context("spawn")
        self._server = server
        self._publisher = ProcessPoolExecutor(1, context)
        self._reader = ProcessPoolExecutor(1, context)

    def bare(self, messages: list[bytes]) -> float:
        self._server.client.flushall()
        self._server.client.xgroup_create(KEY, GROUP, id="0", mkstream=True)
        read = self._reader.submit(read_bare_at_once, self._server.url, len(messages))
        published = self._publisher.submit(publish_bare_at_once, self._server.url, messages)
        return read.result() - published.result()

    def bus(self, folder: Path, events: int, kind: type[Router]) -> float:
        self._server.client.flushall()
        url = self._server.url
        read = self._reader.submit(read_by_router_at_once, url, folder, events, kind)
        published = self._publisher.submit(publish_by_link_at_once, url, folder, events)
        return read.result() - published.result()

    def end(self) -> None:
        self._publisher.shutdown()
        self._reader.shutdown()


def read_by(router: Router, count: int) -> float:
    """Let a router deal with all there is, and return the seconds."""
    stop = threading.Event()
    thread = threading.Thread(target=router.run, args=(stop,))
    began = time.perf_counter()
    thread.start()
    while router.facts().stored < count:
        assert thread.is_alive(), "the router has ended"
        time.sleep(0.001)
    seconds = time.perf_counter() - began
    stop.set()
    thread.join()
    return seconds


def throughput(server: Server, folder: Path, events: int, rounds: int) -> Iterator[list[str]]:
    """Yield rows: what, seconds of the bare calls, of the bus, and their ratio."""
    client, records = server.client, [record(number) for number in range(events)]
    sealer = Sealer(KEYRING, "run")
    messages = [sealer.seal(body_of(EventMessage(record=one)))[1] for one in records]
    processes = Processes(server)
    gc.collect()
    gc.freeze()  # the benchmark's own events are no part of what a collection goes through
    taken: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        taken.setdefault(name, []).append(seconds)

    for number in range(-1, rounds):
        place = folder / f"round{number}"
        client.flushall()
        link_seconds = seconds_of(lambda place=place: publish_by_link(server.url, place, records))
        entries = client.xlen(KEY)
        client.flushall()
        bare_seconds = seconds_of(lambda messages=messages: publish_bare(client, messages))
        client.xgroup_create(KEY, GROUP, id="0")
        read_seconds = seconds_of(lambda: read_bare(client, events))
        client.flushall()
        publish_by_link(server.url, place / "again", records)
        bus = RedisBus(server.url)
        verify_seconds = read_by(Verifying(bus, KEYRING, place, group="a"), events)
        store_seconds = read_by(Router(bus, KEYRING, place / "mirrors", group="b"), events)
        bus.close()
        bare_at_once = processes.bare(messages)
        verify_at_once = processes.bus(folder / f"verify{number}", events, Verifying)
        store_at_once = processes.bus(folder / f"store{number}", events, Router)
        if number < 0:
            print(f"{events} events came in {entries} entries")
            continue  # for everything to be warm
        note("publishing", link_seconds)
        note("bare publishing", bare_seconds)
        note("bare reading", read_seconds)
        note("reading, verifying, parsing", verify_seconds)
        note("the same, and storing", store_seconds)
        note("bare both", bare_seconds + read_seconds)
        note("both, without storing", link_seconds + verify_seconds)
        note("both, with storing", link_seconds + store_seconds)
        note("bare at once", bare_at_once)
        note("at once, without storing", verify_at_once)
        note("at once, with storing", store_at_once)
    processes.end()
    for name, bare in (
        ("publishing", "bare publishing"),
        ("reading, verifying, parsing", "bare reading"),
        ("the same, and storing", "bare reading"),
        ("both, without storing", "bare both"),
        ("both, with storing", "bare both"),
        ("at once, without storing", "bare at once"),
        ("at once, with storing", "bare at once"),
    ):
        ratios = [one / other for one, other in zip(taken[name], taken[bare], strict=True)]
        yield [name, rate(events, taken[bare]), rate(events, taken[name]), spread(ratios, ".2f")]


def rate(events: int, seconds: list[float]) -> str:
    return spread([events / one for one in seconds], ",.0f")


def spread(values: list[float], form: str) -> str:
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}}–{max(values):{form}})"


def resident_mebibytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(server: Server, folder: Path, *, away: bool) -> str:
    """Publish as a training process does while nobody reads, and tell what that holds."""
    url = "redis://127.0.0.1:1" if away else server.url
    server.client.flushall()
    work, resident, number = torch.randn(128, 128), [], 0
    with linked(url, folder) as link:
        for until in REMEMBERED:
            while number < until:
                for _ in range(EVENTS_PER_STEP):
                    link.publish(record(number))
                    number += 1
                for _ in range(4):
                    work = torch.tanh(work @ work)
            resident.append(resident_mebibytes())
    files = (folder / SPOOL_FOLDER).rglob("*.spool")
    spooled = sum(path.stat().st_size for path in files) / 2**20
    stream = server.client.xlen(KEY)
    return f"{resident[0]:.0f} → {resident[1]:.0f} MiB; spool {spooled:.1f} MiB, stream {stream:,}"


class Stepping:
    """A small network that is trained on noise."""

    def __init__(self) -> None:
        self._model = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._inputs = torch.randn(128, WIDTH)
        self._number = 0

    def block(self, steps: int, link: TelemetryLink | None) -> float:
        """Make steps, with an event each if there is a link; return the seconds of one."""
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            self._optimizer.zero_grad()
            nn.functional.mse_loss(self._model(self._inputs), self._inputs).backward()
            self._optimizer.step()
            if link is not None:
                link.publish(record(self._number))
            self._number += 1
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)


def step_cost(server: Server, folder: Path, steps: int, rounds: int) -> Iterator[tuple[str, str]]:
    stepping, arms = Stepping(), ("without", "server there", "server away")
    urls = {"server there": server.url, "server away": "redis://127.0.0.1:1"}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    stepping.block(steps, None)
    for number in range(rounds):
        for arm in arms[number % 3 :] + arms[: number % 3]:
            if arm in urls:
                with linked(urls[arm], folder / f"{arm}{number}") as link:
                    taken[arm].append(stepping.block(steps, link))
            else:
                taken[arm].append(stepping.block(steps, None))
    yield "a step without a bus", f"{spread([1e3 * one for one in taken['without']], '.2f')} ms"
    for arm in arms[1:]:
        ratios = [one / other for one, other in zip(taken[arm], taken["without"], strict=True)]
        yield f"with an event each, {arm}", f"× {spread(ratios, '.3f')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    console.print(f"load before {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder)
        try:
            table = Table(box=None, title=f"{options.events:,} events, {options.rounds} rounds")
            for heading in ("", "bare calls, events/s", "bus, events/s", "times slower"):
                table.add_column(heading, justify="right" if heading else "left")
            for row in throughput(server, folder, options.events, options.rounds):
                table.add_row(*row)
            console.print(table)
            other = Table(box=None, show_header=False)
            for what, cost in step_cost(server, folder, options.steps, options.rounds):
                other.add_row(what, cost)
            for what, away in (("server there", False), ("server away", True)):
                label = f"memory, {REMEMBERED[0]:,} → {REMEMBERED[1]:,} events, {what}"
                other.add_row(label, memory(server, folder / what, away=away))
            console.print(other)
        finally:
            server.end()


if __name__ == "__main__":
    main()
