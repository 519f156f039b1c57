"""How soon does an emergency arrive while a run floods the bus with telemetry?

Starts a redis-server of its own. One process publishes signed events as fast as it can, others
receive, verify and parse all that comes, and this one sends emergencies one by one. Shown is how
long each took from before it was signed until it was read, and how many arrived at all, for

- streams of their own, each read by a process;
- streams of their own, each read by a thread of one process;
- the router that `esper serve` starts, until the emergency is in the run's folder, where the
  dashboard finds it: stored, on the disk, and read there by another process;
- one stream for both, read in order.

    python benchmarks/bus_priority.py [--emergencies 200] [--every 0.02]
"""

import argparse
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

import esper
from esper.bus import (
    EMERGENCY,
    TELEMETRY,
    EventMessage,
    Sealer,
    Stream,
    body_of,
    message_in,
    open_envelope,
)
from esper.bus.redis_streams import RedisBus
from esper.lifecycle.events import EventRecord, StageChanged, StepSkipped
from esper.lifecycle.stages import SeedStage
from esper.signing import Keyring
from esper.supervision import children
from esper.supervision.config import ROUTER
from esper.telemetry.run_folder import DATABASE_FILE

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from redis_server import RedisServer

SHARED = Stream(name="shared", max_length=TELEMETRY.max_length)
STREAMS = {stream.name: stream for stream in (EMERGENCY, TELEMETRY, SHARED)}
ROUTED = "the router, until stored"
ARRANGEMENTS = {
    "own streams, a process each": ((EMERGENCY,), (TELEMETRY,)),
    "own streams, a thread each": ((EMERGENCY, TELEMETRY),),
    ROUTED: ((EMERGENCY, TELEMETRY),),
    "one stream for both": ((SHARED,),),
}
"""What each reading process reads; the first stream is that of emergencies, the last is flooded."""
RUN = "flooding"
EMERGENCY_TYPE = StepSkipped.model_fields["type"].default
LOOK_SECONDS = 1e-3
"""Between two looks into the run's folder."""
KEY = b"a key of the benchmark, no secret"
KEYRING = Keyring([KEY])
FLOOD_MESSAGES = 500
"""In one call, each signed."""
LIMIT = 100
START_SECONDS = 1.0
"""Of flooding before the first emergency."""
PATIENCE_SECONDS = 120.0
"""For the first emergency to arrive, and for the last, which nothing can trim."""


def event(number: int, *, emergency: bool = False) -> bytes:
    """Return the body of an event as large as most are."""
    what = (
        StepSkipped(reason="the loss is not finite", value=float("nan"))
        if emergency
        else StageChanged(
            slot="stage2",
            blueprint="conv_light",
            from_stage=SeedStage.TRAINING,
            to_stage=SeedStage.BLENDING,
        )
    )
    record = EventRecord(time_seconds=time.time(), epoch=number // 100, step=number, event=what)
    return body_of(EventMessage(record=record))


def flood(bus: RedisBus, stream: Stream, over: threading.Event) -> int:
    """Publish until it is over; return how many messages."""
    sealer = Sealer(KEYRING, RUN)
    bodies = [event(number) for number in range(FLOOD_MESSAGES)]
    published = 0
    while not over.is_set():
        published += len(bus.publish(stream, [sealer.seal(body)[1] for body in bodies]))
    return published


def read(bus: RedisBus, stream: Stream, over: threading.Event, counts: list[int]) -> None:
    """Read until it is over, and print each emergency's number and when it was read."""
    reader = bus.subscribe(stream, group="readers", consumer="one")
    count = 0
    while not over.is_set():
        deliveries = reader.receive(limit=LIMIT, wait_seconds=0.2)
        for delivery in deliveries:
            envelope = open_envelope(delivery.message, KEYRING)
            record = message_in(envelope).record
            if isinstance(record.event, StepSkipped):
                print(record.step, time.monotonic(), flush=True)
        reader.acknowledge([delivery.entry for delivery in deliveries])
        count += len(deliveries)
    counts.append(count)


def watch(folder: Path, over: threading.Event, counts: list[int]) -> None:
    """As `read`, of what the router has stored."""
    file = folder / RUN / DATABASE_FILE
    while not file.exists() and not over.is_set():
        time.sleep(LOOK_SECONDS)
    stored = "SELECT count(*) FROM events"
    emergencies = "SELECT id, step FROM events WHERE type = ? AND id > ?"
    last = 0  # row that was printed
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        while not over.is_set():
            for row, step in database.execute(emergencies, (EMERGENCY_TYPE, last)):
                print(step, time.monotonic(), flush=True)
                last = row
            time.sleep(LOOK_SECONDS)
        counts.append(database.execute(stored).fetchone()[0])


def play(role: str, url: str, *names: str) -> None:
    """Be one of the other processes, until standard input ends; print what was counted last."""
    over = threading.Event()
    counts: list[int] = []
    began = time.monotonic()
    with closing(RedisBus(url)) as bus:
        if role == "flood":
            work = [lambda: counts.append(flood(bus, STREAMS[names[0]], over))]
        elif role == "watch":
            work = [lambda: watch(Path(names[0]), over, counts)]
        else:
            work = [lambda name=name: read(bus, STREAMS[name], over, counts) for name in names]
        threads = [threading.Thread(target=part) for part in work]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        over.set()
        for thread in threads:
            thread.join()
    print("rate", sum(counts) / (time.monotonic() - began), flush=True)


class Player:
    """A process in a role; what it prints is collected."""

    def __init__(self, role: str, url: str, names: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--role", role, url, *names]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.printed: dict[str, float] = {}
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def _collect(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            name, number = line.split()
            self.printed[name] = float(number)

    def end(self) -> None:
        """Let it end; `printed` has all then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._thread.join()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def playing(role: str, url: str, *names: str) -> Iterator[Player]:
    player = Player(role, url, names)
    try:
        yield player
    finally:
        player.end()


@contextmanager
def routing(url: str) -> Iterator[Player]:
    """Start a router as `esper serve` does, and a process that watches what it stores."""
    with tempfile.TemporaryDirectory() as place:
        keys, folder = Path(place, "keys"), Path(place, "mirrors")
        keys.touch(mode=0o600)
        keys.write_bytes(KEY)
        command = [sys.executable, "-m", children.__name__, ROUTER, "--bus", url]
        router = subprocess.Popen([*command, "--folder", folder, "--key-file", keys])  # noqa: S603
        try:
            with playing("watch", url, str(folder)) as player:
                yield player
        finally:
            router.terminate()
            router.wait()


class Distress:
    """Sends emergencies, one by one, and waits for them."""

    def __init__(self, bus: RedisBus, arrangement: str, readers: Sequence[Player]) -> None:
        self._bus = bus
        self._stream = ARRANGEMENTS[arrangement][0][0]
        self._telemetry = ARRANGEMENTS[arrangement][-1][-1]
        self._reader = readers[0]
        self._sealer = Sealer(KEYRING, RUN)
        self._called = 0

    def call(self) -> tuple[str, float]:
        """Send one; return its number, and when its making began."""
        began = time.monotonic()
        self._called += 1
        _, message = self._sealer.seal(event(self._called, emergency=True))
        self._bus.publish(self._stream, [message])
        return str(self._called), began

    def call_until_heard(self) -> None:
        """Wait for the other processes: for telemetry to come, and something to be read."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._bus.latest(self._telemetry, limit=1) or not self._reader.printed:
            assert time.monotonic() < end, "no emergency was read"
            self.call()
            time.sleep(0.2)

    def wait(self) -> None:
        """Wait until all that were sent have been read, or can no longer be."""
        last, _ = self.call()
        end = time.monotonic() + PATIENCE_SECONDS
        while last not in self._reader.printed:
            assert time.monotonic() < end, "the last emergency was not read"
            time.sleep(0.02)


def measure(arrangement: str, count: int, every_seconds: float) -> tuple[list[float], float, float]:
    """Return the latencies of what arrived, and how many messages a second were sent and read."""
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(fsync="everysec"))
        bus = stack.enter_context(closing(RedisBus(server.url)))
        readers = [
            stack.enter_context(
                routing(server.url)
                if arrangement == ROUTED
                else playing("read", server.url, *(stream.name for stream in streams))
            )
            for streams in ARRANGEMENTS[arrangement]
        ]
        distress = Distress(bus, arrangement, readers)
        flooded = ARRANGEMENTS[arrangement][-1][-1]
        with playing("flood", server.url, flooded.name) as flooder:
            distress.call_until_heard()
            time.sleep(START_SECONDS)
            sent = {}
            for _ in range(count):
                number, began = distress.call()
                sent[number] = began
                time.sleep(every_seconds)
        distress.wait()
    heard = readers[0].printed
    latencies = [heard[number] - at for number, at in sent.items() if number in heard]
    return latencies, flooder.printed["rate"], sum(reader.printed["rate"] for reader in readers)


def percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--emergencies", type=int, default=200)
    parser.add_argument("--every", type=float, default=0.02, help="seconds between two")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        play(*options.role)
        return
    console = Console(width=100)
    console.print(
        f"{options.emergencies} emergencies while telemetry floods; esper {esper.__version__}, "
        f"load before {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
    )
    table = Table(box=None)
    table.add_column("")
    for name in ("arrived", "median", "99 %", "slowest", "flooded", "read"):
        table.add_column(name, justify="right")
    slow = []
    for arrangement in ARRANGEMENTS:
        latencies, flooded, taken = measure(arrangement, options.emergencies, options.every)
        slow.append(percentile(latencies, 99))
        table.add_row(
            *(arrangement, f"{len(latencies)} of {options.emergencies}"),
            *(f"{1e3 * percentile(latencies, percent):,.1f} ms" for percent in (50, 99)),
            f"{1e3 * max(latencies, default=float('nan')):,.1f} ms",
            *(f"{flooded:,.0f}/s", f"{taken:,.0f}/s"),
        )
    console.print(table)
    console.print(
        f"at 99 %, one stream takes {slow[3] / slow[0]:,.0f} times as long as a process each, "
        f"{slow[3] / slow[1]:,.0f} times as long as a thread each, and {slow[3] / slow[2]:,.0f} "
        "times as long as the router, which also stores"
    )


if __name__ == "__main__":
    main()
