"""Run folders for the dashboard, a server of them, and a process that writes one."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from esper.dashboard import CommandChannel, DashboardServer
from esper.lifecycle import BlendOperator, Isolation, SeedObjective, SeedStage
from esper.lifecycle.alpha import AlphaCurve
from esper.lifecycle.events import (
    AlphaTargetSet,
    ContributionMeasured,
    Event,
    EventRecord,
    RunFinished,
    RunStarted,
    SeedCommitted,
    SeedGerminated,
    SeedPruned,
    StageChanged,
    StepSkipped,
)
from esper.telemetry import RunStore

Found = TypeVar("Found")
WAIT_SECONDS = 20.0
BEGAN = 1_800_000_000.0
CONFIG = {
    "task": "digits",
    "policy": "heuristic",
    "random_seed": 3,
    "learning_rate": 0.01,
    "device": "cpu",
    "trainer": {"epochs": 10},
}

WRITER = """
import sys
from pathlib import Path
from esper.lifecycle.events import EventRecord, StepSkipped
from esper.telemetry.run_store import ReopenedRunStore, RunStore
import served_runs
folder, how = Path(sys.argv[1]), sys.argv[2]
store = (
    ReopenedRunStore(folder, after_step=int(how))
    if how.isdecimal()
    else RunStore(folder, config={**served_runs.CONFIG, "task": how}, environment={})
)
print("ready", flush=True)
for line in sys.stdin:
    command, *rest = line.split()
    if command == "skip":
        served_runs.skip(store, int(rest[0]), " ".join(rest[1:]))
    elif command == "measure":
        store.measure(int(rest[0]), 10 * int(rest[0]), {"loss": float(rest[1])})
    elif command == "grow":
        served_runs.write_life(store, slot="stage1", epoch=int(rest[0]))
    elif command == "finish":
        store.set_status("finished")
        store.close()
    print("done", flush=True)
"""


def publish(store: RunStore, epoch: int, *events: Event) -> None:
    for event in events:
        record = EventRecord(time_seconds=BEGAN + epoch, epoch=epoch, step=10 * epoch, event=event)
        store.publish(record)


def skip(store: RunStore, epoch: int, reason: str) -> None:
    publish(store, epoch, StepSkipped(reason=reason, value=2.5))


def write_life(store: RunStore, *, slot: str, epoch: int, until: str = "blending") -> None:
    """Germinate a seed and bring it on: to "blending", "committed" or "pruned"."""
    seed = {"slot": slot, "blueprint": "conv_light"}

    def to(before: SeedStage, after: SeedStage) -> StageChanged:
        return StageChanged(**seed, from_stage=before, to_stage=after)

    publish(
        store,
        epoch,
        to(SeedStage.DORMANT, SeedStage.GERMINATED),
        SeedGerminated(
            **seed,
            options={},
            param_count=300,
            blend_operator=BlendOperator.ADD,
            isolation=Isolation.NONE,
            objective=SeedObjective.PROXIMAL,
            prewarm_ms=0.0,
        ),
        to(SeedStage.GERMINATED, SeedStage.TRAINING),
    )
    publish(
        store,
        epoch + 1,
        to(SeedStage.TRAINING, SeedStage.BLENDING),
        AlphaTargetSet(slot=slot, from_alpha=0.0, target=1.0, steps=20, curve=AlphaCurve.LINEAR),
        ContributionMeasured(
            slot=slot,
            stage=SeedStage.BLENDING,
            loss_with=0.9,
            loss_without=1.0,
            contribution_fraction=0.1,
            standard_error_fraction=0.01,
        ),
    )
    if until == "committed":
        publish(
            store,
            epoch + 2,
            SeedCommitted(**seed, param_count=300, contribution_fraction=0.1),
            to(SeedStage.PROBATIONARY, SeedStage.FOSSILIZED),
        )
    elif until == "pruned":
        publish(
            store,
            epoch + 2,
            SeedPruned(**seed, from_stage=SeedStage.BLENDING, reason="no use"),
            to(SeedStage.BLENDING, SeedStage.PRUNED),
        )


def write_run(folder: Path, *, finished: bool = True, **config: Any) -> None:
    """Write a run of ten epochs with one seed committed and one pruned."""
    store = RunStore(folder, config={**CONFIG, **config}, environment={"device": "cpu"})
    slots = ("stage1", "stage2")
    publish(store, 0, RunStarted(slots=slots, host_param_count=1000))
    for epoch in range(1, 11):
        values = {"loss": 2.0 / epoch, "accuracy": 0.0875 * epoch, "flops": 1e6 * epoch}
        store.measure(epoch, 10 * epoch, values)
    write_life(store, slot="stage1", epoch=2, until="committed")
    write_life(store, slot="stage2", epoch=3, until="pruned")
    if finished:
        publish(store, 10, RunFinished(metrics={"loss": 0.19}, param_count=1300))
        store.set_status("finished")
    store.close()


@contextmanager
def serving(
    root: Path, *, port: int = 0, token: str | None = None, channel: CommandChannel | None = None
) -> Iterator[DashboardServer]:
    """Serve a folder from a thread of this process."""
    server = DashboardServer(root, port=port, token=token, channel=channel)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        eventually(lambda: answers(server.address.url))
        yield server
    finally:
        server.stop()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


class Writer:
    """A process that writes a run folder, as it is told."""

    def __init__(self, folder: Path, how: str = "digits") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        )
        self._wait_for("ready")

    def tell(self, *words: object) -> None:
        """Have something written, and wait until it is."""
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        self._wait_for("done")

    def kill(self) -> None:
        """End it as the kernel does, with no time to say anything."""
        self._process.kill()
        self._process.communicate()

    def _wait_for(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == word


@contextmanager
def writing(folder: Path, how: str = "digits") -> Iterator[Writer]:
    writer = Writer(folder, how)
    try:
        yield writer
    finally:
        writer.kill()


class Stream:
    """An open stream of news."""

    def __init__(self, url: str, *, run: str | None = None, last_id: str | None = None) -> None:
        headers = {} if last_id is None else {"last-event-id": last_id}
        query = {} if run is None else {"run": run}
        self._client = httpx.Client(timeout=WAIT_SECONDS)
        self._stream = self._client.stream("GET", f"{url}api/stream", params=query, headers=headers)
        self._lines = self._stream.__enter__().iter_lines()
        self.last_id = ""

    def next(self, kind: str, wanted: Callable[[Any], bool] = lambda _: True) -> Any:
        """Return the next message of a kind that is wanted; others are passed over."""
        event = ""
        end = time.monotonic() + WAIT_SECONDS
        for line in self._lines:
            assert time.monotonic() < end, f"waited in vain for {kind}"
            field, _, value = line.partition(": ")
            if field == "event":
                event = value
            elif field == "id":
                self.last_id = value
            elif field == "data" and event == kind and wanted(message := json.loads(value)):
                return message
        raise AssertionError(f"the stream ended without {kind}")

    def is_over(self) -> bool:
        """Read to the end of what comes; return True once the server has ended the stream."""
        return [line for line in self._lines if line.startswith("data: {")] == []

    def close(self) -> None:
        self._client.close()


@contextmanager
def streaming(url: str, **options: Any) -> Iterator[Stream]:
    stream = Stream(url, **options)
    try:
        yield stream
    finally:
        stream.close()


def eventually(condition: Callable[[], Found]) -> Found:
    """Return what the condition finds as soon as it is true."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found
