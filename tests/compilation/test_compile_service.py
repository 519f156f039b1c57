"""Seeds compiled in another process while training goes on; a real one, killed for real."""

import dataclasses
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from compiled_run import WIDTH, Run, Wrong, graphs
from esper import SeedStage
from esper.compilation import ArtefactStore, CompiledHost, CompileService
from esper.compilation.alone import seed_alone
from esper.compilation.compile_job import CompileJob
from esper.compilation.compile_request import CompileRequest
from esper.compilation.compile_service import WorkerError, _Worker
from esper.compilation.compiled_host import seed_options
from esper.compilation.feature_guards import FeatureGuards
from esper.compilation.inductor_cache import CACHE_VARIABLE, LEFTOVER_SECONDS
from esper.compilation.pipe import pack_object, unpack_object
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import ArtefactRefused, CompileFailed, SeedCompiled
from esper.seeds import Seed, blueprints
from esper.signing import Keyring
from esper.slots.call_arguments import CallArguments
from esper.slots.nested import tensors_in
from processes import kill_after

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]
MAX_STEPS = 200_000
BUSY = """
import dataclasses, os, pickle, sys, time
os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[1] + "/inductor"
import torch
from esper.compilation import ArtefactStore, CompileService
from esper.compilation.alone import seed_alone
from esper.compilation.compile_job import CompileJob
from esper.compilation.feature_guards import FeatureGuards
from esper.signing import Keyring

features = FeatureGuards.of(torch.randn(2, 8, 4, 4))
service = CompileService(ArtefactStore(sys.argv[1] + "/store", Keyring([b"k" * 32])))
job = CompileJob.of(seed_alone("norm", features), features, {})

class Sleep:
    def __reduce__(self):
        return time.sleep, (600.0,)

service.ask(dataclasses.replace(job, slot=pickle.dumps(Sleep())))
while service.worker_pid is None:
    time.sleep(0.01)
print("worker", service.worker_pid, flush=True)
time.sleep(600.0)
"""
"""What is killed: a process that has a worker busy."""


@pytest.fixture(autouse=True)
def _found_by_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker import the classes of this module: it searches where this process does."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "inductor"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(str(tmp_path / "store"), Keyring([b"k" * 32]))


def job_for(blueprint: str) -> CompileJob:
    features = FeatureGuards.of(torch.randn(2, WIDTH, 4, 4, requires_grad=True))
    return CompileJob.of(
        seed_alone(blueprint, features), features, seed_options(backend="aot_eager")
    )


def step_until_an_event(run: Run) -> Any:
    for _ in range(MAX_STEPS):
        run.step()
        if run.events:
            return run.events.pop(0)
    raise AssertionError("nothing was heard of the compiler")


def beside(run: Run, plain: Run) -> None:
    """Let an eager run make the steps that the other one has made, and compare."""
    while plain.number < run.number:
        plain.step()
    for name, parameter in plain.host.named_parameters():
        assert torch.equal(run.host.get_parameter(name), parameter), name


def test_a_worker_compiles_what_a_step_then_finds_ready(store: ArtefactStore) -> None:
    with CompileService(store) as service:
        run = Run(compiled=True, backend="inductor", service=service)
        run.step()
        counters.clear()
        run.slots["first"].germinate("norm")
        run.compiled_in_steps = 0
        event = step_until_an_event(run)
        assert isinstance(event, SeedCompiled)
        assert (event.slot, event.kinds, event.source) == ("first", 2, "worker")
        assert counters["inductor"]["fxgraph_cache_hit"] == 4, "forward and backward of both"
        assert counters["inductor"]["fxgraph_cache_miss"] == 0
        assert run.compiled_in_steps == 0
        assert run.slots["first"].measurements.prewarm_ms >= event.milliseconds
        (name,) = store.names()
        assert store.describe(name).warm_ms < 0.5 * store.describe(name).cold_ms
        before = graphs()
        run.slots["second"].germinate("norm")
        event = step_until_an_event(run)
        assert (event.slot, event.source) == ("second", "worker")
        assert graphs() == before, "an equal seed in another slot finds the graphs themselves"


def test_another_run_takes_it_from_the_store(store: ArtefactStore) -> None:
    sources = []
    for _ in range(2):
        with CompileService(store) as service:
            run = Run(compiled=True, service=service)
            run.slots["first"].germinate("norm")
            sources.append(step_until_an_event(run).source)
    assert sources == ["worker", "store"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_another_machine_finds_every_graph_in_the_store(
    store: ArtefactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    for number in range(2):
        folder = tmp_path / f"inductor {number}"
        folder.mkdir(mode=0o700)
        monkeypatch.setenv(CACHE_VARIABLE, str(folder))
        torch._dynamo.reset()
        with CompileService(store) as service:
            run = Run(compiled=True, backend="inductor", service=service, device="cuda")
            run.step()
            counters.clear()
            run.slots["first"].germinate("norm")
            run.compiled_in_steps = 0
            event = step_until_an_event(run)
            assert isinstance(event, SeedCompiled), event
            sources.append(event.source)
            assert counters["inductor"]["fxgraph_cache_hit"] == 4
            assert counters["inductor"]["fxgraph_cache_miss"] == 0
            assert run.compiled_in_steps == 0
    assert sources == ["worker", "store"]


def test_a_copy_of_a_compiled_block_is_compiled_elsewhere_too(store: ArtefactStore) -> None:
    with CompileService(store) as service:
        run = Run(compiled=True, service=service)
        run.slots["first"].germinate("block", source="own")
        event = step_until_an_event(run)
        assert (event.blueprint, event.source) == ("block", "worker"), event


def test_a_seed_that_keeps_what_it_has_computed_can_be_compiled_elsewhere() -> None:
    features = FeatureGuards.of(torch.randn(2, WIDTH, 4, 4, requires_grad=True))
    slot = seed_alone("norm", features)
    slot.kept = 2.0 * torch.ones(2, requires_grad=True)  # as a block does its attention map
    assert CompileJob.of(slot, features, {}).slot


def test_a_job_says_which_arguments_of_a_call_require_a_gradient() -> None:
    features = FeatureGuards.of(torch.randn(2, WIDTH, 4, 4, requires_grad=True))
    learned = torch.ones(2, requires_grad=True)
    call = CallArguments((2.0 * learned, torch.arange(2)), {"bias": learned.detach()})
    job = CompileJob.of(seed_alone("norm", features), features, {}, call)
    sent = unpack_object(pack_object(job)).call
    assert [t.requires_grad for t in tensors_in((sent.args, sent.kwargs))] == [True, False, False]


def test_what_is_foreseen_is_there_when_it_germinates(store: ArtefactStore) -> None:
    with CompileService(store, max_ahead=1) as service:
        run = Run(compiled=True, service=service)
        assert run.compiled is not None
        run.step()  # which shows the features
        coming = [Germinate(slot="first", blueprint=name) for name in ("norm", "conv_light")]
        state = torch.get_rng_state()
        nonsense = Germinate(slot="first", blueprint="nonsense")
        run.compiled.foresee([nonsense, *coming])
        run.compiled.foresee([nonsense])
        assert torch.equal(torch.get_rng_state(), state)
        deadline = time.monotonic() + 120.0
        while service.version == 0:
            assert time.monotonic() < deadline, "nothing was foreseen"
            time.sleep(0.01)
        assert run.slots["first"].stage is SeedStage.DORMANT
        run.slots["first"].germinate("norm")
        run.prepare()
        run.step()  # eagerly; its features are compiled for
        (failure, event) = run.events
        assert (failure.blueprint, type(failure)) == ("nonsense", CompileFailed)
        assert (event.blueprint, event.source) == ("norm", "worker")


def test_options_that_a_worker_cannot_be_told_are_refused_before_a_step(
    store: ArtefactStore,
) -> None:
    def mine(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        return graph.forward

    run = Run(compiled=False)
    with CompileService(store) as service, pytest.raises(ValueError, match=r"backend=<function .*"):
        CompiledHost(run.slots, service=service, backend=mine)
    assert not any("forward" in vars(part) for part in run.host.modules())
    CompiledHost(run.slots, backend=mine).release()


def test_what_failed_ahead_is_not_tried_in_the_run(store: ArtefactStore) -> None:
    with CompileService(store, limit_seconds=0.05) as service:
        run = Run(compiled=True, service=service)
        assert run.compiled is not None
        run.step()
        run.compiled.foresee([Germinate(slot="first", blueprint="norm")])
        deadline = time.monotonic() + 60.0
        while service.version == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = graphs()
        run.slots["first"].germinate("norm")
        run.prepare()
        event = step_until_an_event(run)
        assert isinstance(event, CompileFailed)
        assert "took longer" in event.error
        assert graphs() == before


def test_what_failed_in_one_life_is_tried_again_in_the_next(store: ArtefactStore) -> None:
    class Away(ArtefactStore):
        tried = 0

        def load(self, request: CompileRequest) -> None:
            self.tried += 1
            raise ConnectionResetError(f"the network is away, {self.tried}")

    with CompileService(Away(store.url, store.keyring)) as service:
        run = Run(compiled=True, service=service)
        slot = run.slots["first"]
        for life in (1, 2):
            slot.germinate("norm")
            assert step_until_an_event(run).error.endswith(f"the network is away, {life}")
            slot.prune()
            while slot.stage is not SeedStage.DORMANT:
                slot.advance(force=True)


@pytest.mark.slow
def test_what_a_process_compiles_again_is_in_the_second_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = FeatureGuards.of(torch.randn(2, 4, 3, 3, requires_grad=True))
    job = CompileJob.of(seed_alone("norm", features), features, seed_options(mode="default"))
    kept = []
    for number in range(2):
        folder = tmp_path / f"order-{number}"
        folder.mkdir()
        monkeypatch.setenv(CACHE_VARIABLE, str(folder))
        compiled = job.run()
        kept.append(sorted(path.name for path in folder.rglob("*.main.*")))
    assert compiled.warm_ms < compiled.cold_ms
    assert kept[0] == kept[1]
    assert {name.partition(".")[2] for name in kept[0]} == {"main.cpp", "main.so"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_a_worker_that_reads_no_order_is_ended_in_time(size: int) -> None:
    """The larger one does not fit the pipe."""
    worker = _Worker()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r"took longer than 0\.5 s"):
        worker.do(b"x" * size, 0.5)  # type: ignore[arg-type]
    assert worker.ended
    worker.close()


def test_a_tampered_artefact_is_refused_told_and_made_anew(
    store: ArtefactStore, tmp_path: Path
) -> None:
    for number in range(2):
        with CompileService(store) as service:
            run = Run(compiled=True, service=service)
            run.slots["first"].germinate("norm")
            events = [step_until_an_event(run)]
            if number:
                events.append(step_until_an_event(run))
        (file,) = Path(store.url).iterdir()
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    refused, compiled = events
    assert isinstance(refused, ArtefactRefused)
    assert "not what was signed" in refused.reason
    assert compiled.source == "worker"
    assert {path.name for path in (tmp_path / "inductor").iterdir()} <= {"incoming", "locks"}


class Exits(Wrong):
    """Ends the process that unpickles it, if that is another one."""

    def __init__(self, dim: int, *, raises: bool) -> None:
        super().__init__(dim, raises=raises)
        self.home = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["home"] != os.getpid():
            sys.stderr.write("no more\n")
            sys.stderr.flush()
            os._exit(3)
        super().__setstate__(state)


def unpicklable() -> Seed:
    class Local(Wrong):
        """Of a class that only this function knows."""

    return Local(WIDTH, raises=False)


@pytest.mark.parametrize(
    ("make", "limit_seconds", "told"),
    [
        (lambda: Wrong(WIDTH, raises=True), 600.0, "Unsupported"),
        (lambda: Wrong(WIDTH, raises=False), 600.0, "MiscompiledError"),
        (lambda: Wrong(WIDTH, raises=False), 0.05, "took longer than 0.05 s"),
        (lambda: Exits(WIDTH, raises=False), 600.0, "status 3: no more"),
        (unpicklable, 600.0, "cannot be compiled in another process"),
    ],
    ids=["raises", "miscomputes", "hangs", "dies", "is not found"],
)
def test_what_a_worker_cannot_do_runs_as_it_is(
    store: ArtefactStore, make: Callable[[], Seed], limit_seconds: float, told: str
) -> None:
    with blueprints.temporarily():
        blueprints.register("wrong", family="cnn")(lambda dim: make())
        # Nothing of the host is compiled, so that all is the same to the bit.
        plain = Run(compiled=False)
        with CompileService(store, limit_seconds=limit_seconds) as service:
            run = Run(compiled=True, backend="eager", service=service)
            for each in (run, plain):
                each.slots["first"].germinate("wrong")
            event = step_until_an_event(run)
            assert isinstance(event, CompileFailed), event
            assert (event.place, event.blueprint) == ("first", "wrong")
            assert told in event.error
            for _ in range(3):
                run.step()
            assert run.events == []
            beside(run, plain)
            assert list(store.names()) == []


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_worker_ends_with_the_process_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output = kill_after("worker", ["-c", BUSY, str(tmp_path)])
    pid = int(output.split("worker ")[1].split()[0])
    deadline = time.monotonic() + 60.0
    while not ended(pid):
        assert time.monotonic() < deadline, "the worker is an orphan"
        time.sleep(0.05)
    assert list(tmp_path.glob("esper-compiling-*")) == []


def test_what_killed_processes_have_left_is_removed(store: ArtefactStore, tmp_path: Path) -> None:
    name = store.name_of(job_for("noop").request)
    files = {}
    for kind, age in (("0", LEFTOVER_SECONDS + 60.0), ("1", 0.0)):
        aside = Path(store.url) / f"{name}-{16 * kind}"
        incoming = tmp_path / "inductor" / "incoming" / (32 * kind)
        kept = Path(store.url) / f"{kind}.artefact"
        for file in (aside, incoming, kept):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"half")
            os.utime(file, 2 * (time.time() - age,))
        files[kind] = aside, incoming, kept
    with CompileService(store):
        deadline = time.monotonic() + 60.0
        while any(file.exists() for file in files["0"][:2]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert files["0"][2].exists()
    assert all(file.exists() for file in files["1"])


def test_what_is_needed_comes_before_what_may_be(store: ArtefactStore) -> None:
    first, later, needed = map(job_for, ("noop", "norm", "depthwise"))
    with CompileService(store, max_ahead=2) as service:
        for job in (first, later):
            service.ask(job, ahead=True)
        service.ask(needed)
        for job in (first, later, needed):
            assert service.wait(job).error is None
    made = sorted((store.describe(name) for name in store.names()), key=lambda a: a.created)
    assert [artefact.request.living for artefact in made] == ["noop", "depthwise", "norm"]


class Foreign:
    """Cannot be found by another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _only_in, (os.getpid(),)


def _only_in(process: int) -> None:
    if process != os.getpid():
        raise AttributeError("no such class")


def test_an_order_that_cannot_be_opened_is_told_at_once(store: ArtefactStore) -> None:
    job = dataclasses.replace(job_for("norm"), call=CallArguments((Foreign(),)))
    with CompileService(store, limit_seconds=60.0) as service:
        assert service.wait(job).error == "AttributeError: no such class"
        assert service.wait(job_for("noop")).error is None, "and the worker goes on"


class Junk:
    """Lets a worker answer what is no answer."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _answer_junk, (os.getpid(),)


def _answer_junk(home: int) -> None:
    if os.getpid() != home:
        os.write(int(sys.argv[1]), b"\xff" * 8)


def test_a_worker_whose_answer_is_none_is_replaced(store: ArtefactStore) -> None:
    job = dataclasses.replace(job_for("norm"), call=CallArguments((Junk(),)))
    with CompileService(store) as service:
        assert "OverflowError" in service.wait(job).error
        assert service.worker_pid is None
        assert service.wait(job_for("noop")).error is None


OWN_SEED = """
from torch import nn
from esper import Seed
from esper.seeds import zero_initialise_

print("imported")

class Own(Seed):
    def __init__(self, dim):
        super().__init__()
        self.layer = zero_initialise_(nn.Conv2d(dim, dim, 1))

    @property
    def output_layers(self):
        return (self.layer,)

    def increment(self, features):
        return self.layer(features)
"""


@pytest.mark.parametrize("on_the_path", [False, True])
def test_a_workers_own_modules_are_not_those_of_the_working_directory(
    store: ArtefactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_the_path: bool
) -> None:
    (tmp_path / "queue.py").write_text('print("my queue")')
    (tmp_path / "own_seed.py").write_text(OWN_SEED)
    monkeypatch.chdir(tmp_path)
    job = job_for("noop")
    if on_the_path:  # as code of one's own is found
        monkeypatch.syspath_prepend(str(tmp_path))
        with blueprints.temporarily():
            blueprints.register("own", family="cnn")(importlib.import_module("own_seed").Own)
            job = job_for("own")
    with CompileService(store) as service:
        assert service.wait(job).error is None


def test_a_store_in_a_relative_folder_is_the_same_one_in_a_worker_started_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ArtefactStore("store", Keyring([b"k" * 32]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with CompileService(store) as service:
        assert service.wait(job_for("noop")).error is None
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_closing_does_not_wait_for_a_store_that_does_not_answer(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(ArtefactStore):
        def load(self, request: CompileRequest) -> None:
            loading.set()
            answers.wait()

    loading, answers = threading.Event(), threading.Event()
    monkeypatch.setattr("esper.compilation.compile_service._CLOSING_SECONDS", 0.01)
    service = CompileService(Hanging(store.url, store.keyring))
    service.ask(job_for("noop"))
    loading.wait()
    service.close()
    assert service._thread.is_alive()
    answers.set()
    service._thread.join()


def test_a_worker_that_died_meanwhile_is_replaced(store: ArtefactStore) -> None:
    with CompileService(store) as service:
        assert service.wait(job_for("noop")).error is None
        pid = service.worker_pid
        os.kill(pid, signal.SIGKILL)
        while service._worker is not None and not service._worker.ended:
            time.sleep(0.01)
        assert service.wait(job_for("norm")).error is None
        assert service.worker_pid != pid


def test_what_cannot_be_foreseen_yet_is_asked_for_again(store: ArtefactStore) -> None:
    with CompileService(store, max_ahead=1) as service:
        run = Run(compiled=True, service=service)
        assert run.compiled is not None
        run.step()
        names = ("noop", "norm", "depthwise", "conv_light")
        coming = [Germinate(slot="first", blueprint=name) for name in names]
        coming.insert(0, Germinate(slot="nowhere", blueprint="norm"))
        deadline = time.monotonic() + 120.0
        while len(list(store.names())) < len(names):
            run.compiled.foresee(coming)
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_answer_is_heard_whoever_asks_in_between(store: ArtefactStore) -> None:
    with CompileService(store) as service:
        run = Run(compiled=True, service=service)
        run.slots["first"].germinate("norm")
        run.step()
        run.step()
        assert run.compiled is not None
        job = job_for("noop")
        service.wait(job)
        while service.answer(run.compiled.seeds["first"].waits_for) is None:
            time.sleep(0.01)
        assert service.answer(job.request) is not None
        assert run.compiled.due()


def test_closing_ends_a_worker_that_is_busy(store: ArtefactStore) -> None:
    service = CompileService(store)
    job = job_for("norm")
    service.ask(job)
    while (pid := service.worker_pid) is None:
        time.sleep(0.01)
    started = time.monotonic()
    service.close()
    assert time.monotonic() - started < 10.0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    with pytest.raises(RuntimeError, match="closed"):
        service.wait(job)


@pytest.mark.parametrize("waits", [False, True], ids=["before", "while it waits"])
def test_a_seed_for_which_the_service_was_closed_runs_as_it_is(
    store: ArtefactStore, waits: bool
) -> None:
    with CompileService(store) as service:
        run = Run(compiled=True, service=service)
        run.step()
        if waits:
            run.slots["first"].germinate("norm")
            run.step()
    if not waits:
        run.slots["first"].germinate("norm")
    event = step_until_an_event(run)
    assert event.error == "CompileError: the compile service was closed"
    assert run.compiled is not None
    assert not run.compiled.pending
