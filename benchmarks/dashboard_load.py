"""Does the dashboard stand 200 runs and 100,000 events?

Makes a folder of runs, all but one of some hundred events and one of 100,000; serves it by the
command, as a process of its own; and looks at it with a real Chromium without a window. Shown are

- the list: from the navigation until every row is in the page and painted, the server fresh, and
  again;
- the long run: from the navigation until its first figures and slots are painted, and until its
  charts are drawn, the server not having read it, and again; and how long the server let somebody
  else wait meanwhile, at most;
- memory of the server (resident) and of the page (JavaScript heap);
- the server's share of one core while a page is open and nothing happens;
- latency: from an event's commit in a process that writes a run to its line in the page and the
  next frame, on that run's page, with all others in the list.

    python benchmarks/dashboard_load.py [--runs 200] [--events 100000] [--small 500]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.table import Table

import esper
from esper.lifecycle import BlendOperator, Gate, Isolation, SeedObjective, SeedStage
from esper.lifecycle.alpha import AlphaCurve
from esper.lifecycle.events import (
    AlphaTargetReached,
    AlphaTargetSet,
    CachesSwept,
    ContributionMeasured,
    Event,
    EventRecord,
    GateEvaluated,
    GradientHealthMeasured,
    RunFinished,
    RunStarted,
    SeedCommitted,
    SeedGerminated,
    SeedPruned,
    StageChanged,
    StepSkipped,
)
from esper.lifecycle.gates import Check, GateResult
from esper.telemetry import RunStore

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SLOTS = ("stage1", "stage2", "stage3", "stage4")
LIFE_EPOCHS = 40
STEPS_IN_EPOCH = 20
WATCHED = "watched"
LONG = "long"
WAIT_MILLISECONDS = 120_000
IDLE_SECONDS = 10.0
TIMED_EVENTS = 40

WRITER = """
import sys, time
from pathlib import Path
import dashboard_load
store = dashboard_load.begun(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    dashboard_load.mark(store, line.strip())
    print(time.time(), flush=True)
"""

OBSERVER = """
window.seen = {};
const look = (runs) => {
  const rows = document.querySelectorAll(".row").length;
  if (rows === runs && !("rows" in seen)) {
    seen.rows = 0;
    requestAnimationFrame(() => requestAnimationFrame(() => (seen.rows = performance.now())));
  }
  if (document.querySelector(".slot") && !("slots" in seen)) {
    seen.slots = 0;
    requestAnimationFrame(() => requestAnimationFrame(() => (seen.slots = performance.now())));
  }
  const charts = document.querySelector(".charts");
  if (charts?.dataset.version && !("charts" in seen)) {
    seen.charts = 0;
    requestAnimationFrame(() => requestAnimationFrame(() => (seen.charts = performance.now())));
  }
  const words = document.querySelector(".lines li .words")?.textContent ?? "";
  const mark = /mark-\\d+/.exec(words)?.[0];
  if (mark && !(mark in seen)) {
    seen[mark] = 0;
    requestAnimationFrame(() => (seen[mark] = Date.now() / 1000));
  }
};
new MutationObserver(() => look(RUNS)).observe(document, {
  subtree: true, childList: true, attributes: true, attributeFilter: ["data-version"],
});
"""


def begun(folder: Path) -> RunStore:
    """Return the store of a run that has only begun."""
    config = {
        "task": "digits",
        "policy": "heuristic",
        "random_seed": 0,
        "learning_rate": 0.005,
        "device": "cpu",
        "trainer": {"epochs": 1000},
    }
    store = RunStore(folder, config=config, environment={})
    publish(store, 0, RunStarted(slots=SLOTS, host_param_count=10_000))
    return store


def publish(store: RunStore, epoch: int, *events: Event) -> None:
    for event in events:
        step = STEPS_IN_EPOCH * epoch
        record = EventRecord(time_seconds=time.time(), epoch=epoch, step=step, event=event)
        store.publish(record)


def mark(store: RunStore, name: str) -> None:
    """Store an event that the page shows, and what is measured with it."""
    publish(store, 1, StepSkipped(reason=name, value=1.0))


def write_run(folder: Path, events: int) -> None:
    """Write a finished run: seeds germinate, are measured and judged, and end, in every slot."""
    store = begun(folder)
    written, epoch = 1, 0
    while written < events - 1:
        epoch += 1
        for slot in SLOTS:
            for event in told(slot, epoch):
                if written < events - 1:
                    publish(store, epoch, event)
                    written += 1
        loss = 2.0 / (1.0 + 0.01 * epoch) + 0.02 * ((7 * epoch) % 10)
        store.measure(
            epoch,
            STEPS_IN_EPOCH * epoch,
            {
                "loss": loss,
                "accuracy": 1.0 / (1.0 + loss),
                "train_loss": 0.9 * loss,
                "step_seconds": 0.01,
                "flops": 1e9 * epoch,
            },
        )
    publish(store, epoch, RunFinished(metrics={"loss": 0.2}, param_count=14_000))
    store.set_status("finished")
    store.close()


def told(slot: str, epoch: int) -> Iterator[Event]:
    """Yield what a slot tells in an epoch of the life of its seed."""
    age, life = epoch % LIFE_EPOCHS, epoch // LIFE_EPOCHS
    stages = [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY]
    seed = {"slot": slot, "blueprint": "conv_light"}
    if age == 1:
        yield StageChanged(**seed, from_stage=SeedStage.DORMANT, to_stage=SeedStage.GERMINATED)
        yield SeedGerminated(
            **seed,
            options={},
            param_count=300,
            blend_operator=BlendOperator.ADD,
            isolation=Isolation.NONE,
            objective=SeedObjective.PROXIMAL,
            prewarm_ms=1.0,
        )
    if age in (2, 10, 18, 26):
        before = ([SeedStage.GERMINATED, *stages])[age // 8]
        yield StageChanged(**seed, from_stage=before, to_stage=stages[age // 8])
    if age == 10:
        yield AlphaTargetSet(
            slot=slot, from_alpha=0.0, target=1.0, steps=100, curve=AlphaCurve.COSINE
        )
    if age == 15:
        yield AlphaTargetReached(slot=slot, alpha=1.0)
    if age == 34 and life % 4 == 0:
        yield SeedCommitted(**seed, param_count=300, contribution_fraction=0.05)
    elif age == 34:
        yield SeedPruned(**seed, from_stage=SeedStage.PROBATIONARY, reason="refused for 6 epochs")
    if 2 <= age < 34:
        saved = 0.05 + 0.01 * (epoch % 7)
        yield ContributionMeasured(
            slot=slot,
            stage=stages[min(3, age // 8)],
            loss_with=1.0 - saved,
            loss_without=1.0,
            contribution_fraction=saved,
            standard_error_fraction=0.01,
        )
        yield GradientHealthMeasured(
            slot=slot,
            host_norm=1.0,
            seed_norm=0.5,
            ratio=0.5,
            nonfinite_steps=0,
            vanishing=False,
            exploding=False,
        )
        check = Check(
            name="contribution", measured=saved, comparison=">=", threshold=0.2, passed=False
        )
        result = GateResult(gate=Gate.G5, checks=(check,))
        yield GateEvaluated(**seed, to_stage=SeedStage.FOSSILIZED, result=result)
    sizes = {"shape_probes": 18}
    yield CachesSwept(sizes=sizes, hits=sizes, misses=sizes)


class Server:
    """The command, as a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "esper", "dashboard", str(folder), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.url = self._process.stdout.readline().strip()
        wait_for(lambda: urlopen(self.url).status == 200)  # noqa: S310 – its own address

    @property
    def resident_mebibytes(self) -> float:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.end()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a server that is starting answers."""
    end = time.monotonic() + 30.0
    while True:
        try:
            if condition():
                return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


class SlowestAnswer:
    """Asks a server for something small, again and again, and keeps how long it took at most."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}api/session"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.seconds = 0.0

    def _ask(self) -> None:
        while not self._over.wait(0.02):
            began = time.perf_counter()
            urlopen(self._url).read()  # noqa: S310 – its own address
            self.seconds = max(self.seconds, time.perf_counter() - began)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def seen(page: Page, what: str) -> float:
    """Return when something was painted first, as soon as it has been."""
    page.wait_for_function(f"() => seen['{what}'] > 0", timeout=WAIT_MILLISECONDS)
    return float(page.evaluate(f"seen['{what}']"))


class Writer:
    """A process that writes a run, an event whenever it is told to."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def write(self, name: str) -> float:
        """Have an event written; return when it was committed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def latencies(page: Page, server: Server, writer: Writer, count: int) -> list[float]:
    """Have events written by another process, and return how long each took to the page."""
    page.goto(f"{server.url}?run={WATCHED}")
    page.wait_for_selector(".slot", timeout=WAIT_MILLISECONDS)
    taken = []
    for index in range(count):
        page.wait_for_timeout(500 + 37 * index % 200)  # in any phase of the server's looks
        committed = writer.write(f"mark-{index}")
        taken.append(seen(page, f"mark-{index}") - committed)
    return taken


def measure(folder: Path, runs: int, writer: Writer) -> Iterator[tuple[str, str]]:
    """Yield what was measured, in words and figures."""
    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright, serving(folder) as server:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(OBSERVER.replace("RUNS", str(runs)))
        before = server.resident_mebibytes
        for when in ("server fresh", "again"):
            page.goto(server.url)
            yield f"list of {runs} runs painted, {when}", f"{seen(page, 'rows') / 1e3:.2f} s"
        listed = server.resident_mebibytes
        spent = server.cpu_seconds
        page.wait_for_timeout(1e3 * IDLE_SECONDS)
        idle = (server.cpu_seconds - spent) / IDLE_SECONDS
        yield "server's share of a core, a page open, nothing happening", f"{idle:.1%}"
        for when in ("not read yet", "again"):
            with SlowestAnswer(server.url) as others:
                page.goto(f"{server.url}?run={LONG}")
                yield f"long run's first figures, {when}", f"{seen(page, 'slots') / 1e3:.2f} s"
                yield f"long run drawn, {when}", f"{seen(page, 'charts') / 1e3:.2f} s"
            yield f"  meanwhile others waited at most, {when}", f"{1e3 * others.seconds:.0f} ms"
        yield "server's memory, nothing read", f"{before:.0f} MiB"
        yield f"server's memory, {runs} runs listed", f"{listed:.0f} MiB"
        yield "server's memory, long run shown", f"{server.resident_mebibytes:.0f} MiB"
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
        yield "page's heap, long run shown", f"{heap:.0f} MiB"
        taken = latencies(page, server, writer, TIMED_EVENTS)
        median, worst = 1e3 * statistics.median(taken), 1e3 * max(taken)
        yield f"event to page, median of {TIMED_EVENTS}", f"{median:.0f} ms"
        yield "event to page, slowest", f"{worst:.0f} ms"
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--small", type=int, default=500)
    options = parser.parse_args()
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(options.runs - 2):
            write_run(folder / f"digits-{index:03}", options.small)
        write_run(folder / LONG, options.events)
        writer = Writer(folder / WATCHED)
        console.print(
            f"{options.runs} runs: one of {options.events:,} events, others of {options.small:,}; "
            f"esper {esper.__version__}, load before {os.getloadavg()[0]:.2f} on "
            f"{os.cpu_count()} cores"
        )
        table = Table(box=None, show_header=False)
        table.add_column("")
        table.add_column("", justify="right")
        try:
            for what, figure in measure(folder, options.runs, writer):
                table.add_row(what, figure)
        finally:
            writer.end()
        console.print(table)


if __name__ == "__main__":
    main()
