"""A host compiled module by module: what it computes, how many graphs, and who waits for them."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import esper
from compiled_run import BATCHES, WIDTH, Block, Host, Run, Wrong, WrongImaginary, graphs
from esper import SeedStage, SlotConfig
from esper.compilation import CompiledHost, MiscompiledError
from esper.compilation.compiled_slot import CompiledSlot
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import BreakerChanged, CompileFailed, SeedCompiled
from esper.seeds import Seed, blueprints, zero_initialise_
from esper.slots.call_arguments import CallArguments
from esper.slots.slot_forward import SlotForward
from esper.training.flop_formulas import flop_counter
from growth_problem import make_problem

pytestmark = [
    # torch's own tracer instantiates, and looks at, what it warns of
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [{}, {"isolation": "shadowing"}], ids=["live", "behind"])
def test_a_life_is_the_eager_one_and_no_step_compiles_what_was_prepared(
    config: dict[str, Any],
) -> None:
    plain, compiled = Run(compiled=False, **config), Run(compiled=True, **config)
    for _ in range(2):
        assert compiled.step() == pytest.approx(plain.step(), rel=1e-4)
    host_graphs = graphs()
    assert host_graphs == 1, "both blocks are the same code"
    compiled.compiled_in_steps = 0
    for path in ("first", "second"):
        lives = [run.live(path, "conv_light") for run in (plain, compiled)]
        for _ in zip(*lives, strict=True):
            for _ in range(4):
                assert compiled.step() == pytest.approx(plain.step(), rel=1e-3)
    assert compiled.compiled_in_steps == 0, "no step has waited for the compiler"
    kinds = 2 if config == {} else 3
    found = [(type(event), event.slot, event.kinds) for event in compiled.events]
    assert found == [(SeedCompiled, "first", kinds), (SeedCompiled, "second", kinds)]
    assert all(event.checked for event in compiled.events)
    assert graphs() == host_graphs + kinds, "the second slot runs the first one's graphs"
    own = dict(plain.host.named_parameters())
    for name, parameter in compiled.host.named_parameters():
        torch.testing.assert_close(parameter, own[name], rtol=1e-3, atol=1e-4, msg=name)


def test_twenty_seeds_over_two_slots_never_meet_a_limit() -> None:
    run = Run(compiled=True)
    names = ["conv_light", "norm", "depthwise", "bottleneck", "conv_small"]
    for number in range(20):
        path = ("first", "second")[number % 2]
        slot = run.slots[path]
        slot.germinate(names[number % len(names)])
        for _ in range(2):
            slot.advance(force=True)
        slot.set_alpha_target(0.5, 0)
        run.step()
        (event,) = run.events
        assert isinstance(event, SeedCompiled)
        run.events, run.compiled_in_steps = [], 0
        run.step()
        assert run.compiled_in_steps == 0
        slot.prune()
        while slot.stage is not SeedStage.DORMANT:
            run.slots.end_epoch()
            if slot.stage in (SeedStage.PRUNED, SeedStage.EMBARGOED, SeedStage.RESETTING):
                slot.advance(force=True)
    assert graphs() <= 1 + 2 * len(names), "what returns costs nothing"


def test_features_of_another_shape_are_compiled_for_once_they_were_seen_up_to_a_number() -> None:
    plain, run = Run(compiled=False), Run(compiled=True)
    for each in (plain, run):
        each.slots["first"].germinate("norm")
        each.slots["first"].advance(force=True)
    compiled = []
    for samples in (5, 4, 3, 2, 6, 5, 6):
        for each in (plain, run):
            each.samples = samples
            losses = [each.step() for _ in range(2)]
        assert losses == pytest.approx([plain.losses[-2], plain.losses[-1]], rel=1e-4)
        compiled.append(len(run.events))
    assert compiled == [1, 2, 3, 4, 4, 4, 4]
    assert not run.compiled.pending


def test_what_may_grow_next_is_foreseen_for_whole_batches_after_a_smaller_last_one() -> None:
    run = Run(compiled=True, backend="eager")
    run.slots["first"].germinate("norm")
    run.slots["first"].advance(force=True)
    for samples in (5, 5, 3):
        run.samples = samples
        run.step()
    assert len(run.events) == 2, "the smaller one was compiled for, too"
    assert run.compiled.seeds["first"].guards.shape[0] == 5


class Picky(Seed):
    """Raises when it is told to; draws random numbers if it is to."""

    def __init__(self, dim: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.layer = zero_initialise_(nn.Conv2d(dim, dim, 1))
        self.dropout = nn.Dropout(drop)
        self.register_buffer("matrix", torch.eye(2), persistent=False)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.layer,)

    def increment(self, features: Tensor) -> Tensor:
        return self.layer(self.dropout(features)) * torch.linalg.cholesky(self.matrix)[0, 0]


@pytest.fixture
def _picky() -> Iterator[None]:
    with blueprints.temporarily():
        blueprints.register("picky", family="cnn")(Picky)
        yield


@pytest.mark.usefixtures("_picky")
def test_a_seed_that_raises_when_compiled_is_pruned_as_one_that_runs_as_it_is() -> None:
    runs = Run(compiled=False), Run(compiled=True)
    for run in runs:
        seed = run.live("first", "picky")
        for _ in range(2):
            next(seed)
            run.step()
        run.slots["first"].seed.matrix.neg_()
        for _ in range(3):
            run.step()
        assert run.slots["first"].stage is SeedStage.PRUNED
    plain, compiled = runs
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert any("LinAlgError" in e.error for e in compiled.events if isinstance(e, CompileFailed))


@pytest.mark.usefixtures("_picky")
def test_a_seed_that_draws_behind_the_host_takes_nothing_from_the_hosts_stream() -> None:
    draws = []
    for compiled in (False, True):
        run = Run(compiled=compiled, isolation="shadowing")
        run.slots["first"].germinate("picky", drop=0.5)
        run.step()
        run.slots["first"].advance(force=True)
        for _ in range(3):
            run.step()
        draws.append(torch.rand(3).tolist())
    assert [type(event) for event in run.events] == [SeedCompiled]
    assert draws[0] == draws[1]


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_mismatch_is_judged_again_on_other_features(wrong: int) -> None:
    run = Run(compiled=False)
    slot = run.slots["first"]
    slot.germinate("norm")
    seed = CompiledSlot(slot)
    kinds = seed.missing()
    run.step()
    calls = []

    def compiled(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
        calls.append(features)
        output = SlotForward.forward(slot, features, call)
        return output if len(calls) > wrong else output.mul(1.01)

    assert seed.seen is not None
    with pytest.raises(MiscompiledError) if wrong == 2 else nullcontext():
        seed.prepare(kinds[:1], seed.seen, compiled)
    assert len(calls) == 2
    assert not torch.equal(*calls)


class Attending(Seed):
    """Attends, with a bias that shifts all keys and so changes nothing, and adds a little."""

    def __init__(self, dim: int, *, little: float = 1.0) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.layer = zero_initialise_(nn.Linear(dim, dim))
        self.small = nn.Parameter(torch.ones(dim))
        self.little = little

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.layer,)

    def increment(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        weights = (self.query(tokens) @ self.key(tokens).transpose(1, 2)).softmax(-1)
        attended = self.layer(weights @ self.value(tokens) + self.little * self.small)
        return attended.transpose(1, 2).reshape(features.shape)


@pytest.mark.parametrize(
    ("autocast", "little"), [(False, 1e-5), (True, 0.1)], ids=["float32", "bfloat16"]
)
def test_a_gradient_that_is_only_rounding_is_none_and_a_small_one_is_compared(
    autocast: bool, little: float
) -> None:
    with blueprints.temporarily():
        blueprints.register("attending", family="cnn")(Attending)
        run = Run(compiled=False)
        slot = run.slots["first"]
        slot.germinate("attending", little=little)
    for parameter in slot.seed.parameters():
        nn.init.normal_(parameter, std=0.3)
    seed = CompiledSlot(slot)
    kinds = seed.missing()[:1]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        run.loss()
    seen = seed.seen
    assert seen is not None

    def otherwise_rounded(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            output = SlotForward.forward(slot, features.float().flip(0, 2), call)
        return output.flip(0, 2).to(features.dtype)

    def miscomputed(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
        nothing = (small - small.detach())[:, None, None]
        return otherwise_rounded(slot, features, call) + little * nothing

    small = slot.seed.small
    seed.prepare(kinds, seen, otherwise_rounded)
    with pytest.raises(MiscompiledError, match=r"shape \(8,\)"):
        seed.prepare(kinds, seen, miscomputed)


@pytest.mark.usefixtures("_picky")
def test_preparing_neither_prunes_a_seed_nor_judges_by_a_broken_batch() -> None:
    run = Run(compiled=True)
    run.slots["first"].germinate("picky")
    run.prepare()
    run.loss()
    run.slots["first"].seed.matrix.neg_()
    (failed,) = run.prepare()
    assert isinstance(failed, CompileFailed)
    assert "LinAlgError" in failed.error
    run.slots["first"].seed.matrix.neg_()
    run.step()
    assert run.slots["first"].stage is SeedStage.GERMINATED
    run.slots["second"].germinate("norm")
    run.prepare()
    run.host(torch.full_like(BATCHES[0], torch.inf)).sum()
    (event,) = run.prepare()
    assert isinstance(event, SeedCompiled)


def test_no_kind_of_call_is_compiled_for_in_a_step() -> None:
    run = Run(compiled=True)
    for path in ("first", "second"):
        run.slots[path].germinate("conv_light")
        run.slots[path].advance(force=True)
        run.slots[path].advance(force=True)
    for _ in range(2):
        run.step()
    calls = run.compiled.seeds["second"]

    def features(*, grad: bool = True, channels_last: bool = False, sliced: bool = False) -> Tensor:
        width = 16 if sliced else 8
        made = torch.randn(5, WIDTH, 8, width)
        made = made.to(memory_format=torch.channels_last) if channels_last else made
        return made.requires_grad_(grad)[..., :8]

    for change in ({"grad": False}, {"channels_last": True}, {"sliced": True}, {}):
        for _ in range(3):
            before = graphs()
            calls(features(**change))
            assert graphs() == before
            run.prepare()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = graphs()
        calls(features())
        assert graphs() == before


def test_a_blended_seed_is_checked_where_alpha_counts() -> None:
    def tripling(graph: torch.fx.GraphModule, _: object) -> Any:
        def run(*args: Any) -> Any:
            return [out * 3.0 if torch.is_tensor(out) else out for out in graph(*args)]

        return run

    run = Run(compiled=True, backend=tripling)
    run.slots["first"].germinate("norm")
    run.prepare()
    run.step()
    (event,) = run.events
    assert isinstance(event, CompileFailed)
    assert "MiscompiledError" in event.error
    assert run.slots["first"].blend_alpha == 0.0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_seed_is_compiled_under_autocast_too() -> None:
    run = Run(compiled=True, backend="inductor")
    run.compiled.release()
    run.compiled = CompiledHost(run.slots)
    for region in run.compiled.regions:
        region.release()
    run.slots["first"].germinate("norm")
    run.prepare()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run.loss().backward()
    (event,) = run.prepare()
    assert isinstance(event, SeedCompiled), event


class Scaled(Block):
    """Reads a number besides its features."""

    def forward(self, features: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(features)


def test_numbers_that_change_from_call_to_call_compile_nothing_in_a_step() -> None:
    run = Run(compiled=True)
    run.host.first.__class__ = Scaled
    run.compiled.release()
    run.compiled = CompiledHost(run.slots, backend="aot_eager")
    run.slots["first"].first_parameter = "features"
    forward = Host.forward

    def scaled(host: Host, images: Tensor) -> Tensor:
        features = host.first(host.stem(images), 1.0 / (1.0 + run.number))
        return host.head(host.second(features).mean(dim=(2, 3)))

    assert forward is not scaled
    type(run.host).forward, run.number = scaled, 0
    try:
        run.slots["first"].germinate("block", source="own")
        run.prepare()
        for _ in range(3):  # the host's own module compiles anew, for any number
            run.step()
        run.compiled_in_steps = 0
        for _ in range(15):
            run.step()
        assert run.compiled_in_steps == 0
        assert len(run.events) <= 5
        assert not any(isinstance(event, CompileFailed) for event in run.events)
    finally:
        type(run.host).forward = forward


class Reading(nn.Module):
    """Reads a memory and a mask besides its features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        masked = torch.stack([mask @ tokens for tokens in memory])
        return features + torch.tanh(self.layer(features) + masked)


class ReadingHost(nn.Module):
    """Gives its layer what a function makes of two memories, a computed and a learned one."""

    def __init__(self, passes: "Passes") -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.learned = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.layer = Reading()
        self.passes = passes

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, *self.passes(self.encoder(tokens), self.learned))


Passes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ReadingRun:
    """A host whose layer, copied, is a seed that is watched but does not train yet."""

    def __init__(self, passes: Passes, *, isolation: str = "none") -> None:
        torch.manual_seed(0)
        self.tokens = torch.randn(4, WIDTH, WIDTH)
        self.host = ReadingHost(passes)
        self.slots = esper.attach(
            self.host, ["layer"], example=self.tokens, config=SlotConfig(isolation=isolation)
        )
        self.optimizer = torch.optim.SGD(self.host.parameters(), lr=0.1)
        self.slots.bind(self.optimizer)
        self.compiled = CompiledHost(self.slots, backend="aot_eager")
        for region in self.compiled.regions:
            region.release()
        self.slot = self.slots["layer"]
        self.slot.germinate("block", source="own")
        self.compiled.prepare()
        self.compiled_in_steps = 0

    def step(self) -> list[Any]:
        """Return what was compiled after it."""
        before = graphs()
        self.host(self.tokens).square().mean().backward()
        self.compiled_in_steps += graphs() - before
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()
        return self.compiled.prepare()


EYE = torch.eye(WIDTH)


@pytest.mark.parametrize("isolation", ["none", "shadowing"])
@pytest.mark.parametrize(
    "passes",
    [
        lambda memory, _: (memory, EYE),
        lambda memory, _: (memory.detach(), EYE),
        lambda memory, _: (memory[0],) * 2,
        lambda _, learned: (learned, EYE),
    ],
    ids=["requires a gradient", "requires none", "comes twice", "is a parameter"],
)
def test_no_step_compiles_for_what_a_seed_reads_of_its_call(passes: Passes, isolation: str) -> None:
    run = ReadingRun(passes, isolation=isolation)
    run.slot.advance(force=True)
    if isolation == "none":
        run.slot.advance(force=True)
    (event,) = run.step()
    assert isinstance(event, SeedCompiled), event
    run.step()
    if isolation != "none":
        run.slot.advance(force=True)
    run.step()
    assert run.slot.stage is SeedStage.BLENDING
    assert run.compiled_in_steps == 0


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (lambda memory, _: (memory[0], memory[1]), lambda memory, _: (memory[0],) * 2),
        (lambda memory, _: (memory, EYE), lambda _, learned: (learned, EYE)),
    ],
    ids=["twice the same", "a parameter"],
)
def test_no_step_compiles_where_other_tensors_of_the_same_shapes_are_read(
    first: Passes, then: Passes
) -> None:
    run = ReadingRun(first)
    for _ in range(2):
        run.slot.advance(force=True)
    for passes in (first, then):
        run.host.passes = passes
        assert [type(event) for event in run.step()] == [SeedCompiled]
    assert run.step() == []
    assert run.compiled_in_steps == 0


def test_the_gradient_of_what_a_seed_reads_of_its_call_is_compared() -> None:
    run = ReadingRun(lambda memory, _: (memory, EYE))
    for _ in range(2):
        run.slot.advance(force=True)
    run.compiled.release()
    seed = CompiledSlot(run.slot)
    kinds = seed.missing()
    run.host(run.tokens)

    def miscomputed(slot: SlotForward, features: Tensor, call: CallArguments) -> Tensor:
        memory, mask = call.args
        return SlotForward.forward(slot, features, CallArguments((memory.detach(), mask)))

    assert seed.seen is not None
    with pytest.raises(MiscompiledError, match="gradients arrive"):
        seed.prepare(kinds, seed.seen, miscomputed)


def test_a_seed_that_is_seen_before_it_trains_is_compiled_for_what_it_will_read() -> None:
    (event,) = ReadingRun(lambda memory, _: (memory, EYE)).step()
    assert isinstance(event, SeedCompiled), event


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_seed_that_reads_a_sparse_tensor_runs_as_it_is() -> None:
    run = ReadingRun(lambda memory, _: (memory, EYE.to_sparse_csr()))
    for _ in range(2):
        run.slot.advance(force=True)
    (event,) = run.step()
    assert isinstance(event, CompileFailed)
    assert "something besides dense tensors and constants" in event.error
    assert graphs() == 0
    assert run.step() == []


@pytest.mark.usefixtures("_picky")
def test_a_part_of_a_seed_in_eval_mode_is_compiled_in_it_and_stays_there() -> None:
    run = Run(compiled=True)
    run.slots["first"].germinate("picky", drop=0.5)
    for _ in range(2):
        run.slots["first"].advance(force=True)
    run.slots["first"].seed.dropout.eval()
    run.step()
    assert [type(event) for event in run.events] == [SeedCompiled]
    run.compiled_in_steps = 0
    run.step()
    assert not run.slots["first"].seed.dropout.training
    assert run.compiled_in_steps == 0


def test_what_was_seen_with_other_seeds_is_not_compiled_for() -> None:
    run = Run(compiled=True)
    run.slots["first"].germinate("norm")
    assert run.compiled is not None
    run.compiled.prepare()
    run.loss()
    seed = run.compiled.seeds["first"]
    assert seed.seen is not None
    run.slots["first"].prune()
    assert run.compiled.prepare() == []
    assert seed.seen is None


def test_measuring_compiles_nothing_and_a_copy_runs_as_it_is() -> None:
    run = Run(compiled=True)
    for _ in run.live("first", "conv_light"):
        run.step()
    before = graphs()
    run.host.eval()
    with torch.inference_mode():
        run.host(BATCHES[0][:3])
    run.host.train()
    with torch.no_grad():
        run.host(BATCHES[0][:3])
    copied = copy.deepcopy(run.host)
    plain = esper.bake(run.host)
    for model in (copied, plain):
        model.train()
        model(BATCHES[0][:2]).sum().backward()
    assert graphs() == before
    assert not any("forward" in vars(part) for part in plain.modules())
    loaded = pickle.loads(pickle.dumps(run.host))  # noqa: S301 – of this very process
    loaded.train()(BATCHES[0][:2]).sum().backward()
    assert graphs() == before
    run.host.train()
    assert run.compiled is not None
    run.compiled.release()
    assert not any("forward" in vars(part) for part in run.host.modules())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda dim: Wrong(dim, raises=False), "differs by"),
        (WrongImaginary, "differs by"),
        (lambda dim: Wrong(dim, raises=True), "Unsupported"),
    ],
    ids=["miscomputes", "miscomputes a complex gradient", "does not compile"],
)
def test_what_the_compiler_cannot_do_runs_as_it_is(make: Callable[[int], Seed], told: str) -> None:
    with blueprints.temporarily():

        @blueprints.register("wrong", family="cnn")
        def wrong(dim: int) -> Seed:
            """Compiled, it is another one."""
            return make(dim)

        plain, run = Run(compiled=False), Run(compiled=True)
        lives = [r.live("first", "wrong") for r in (plain, run)]
        for _ in zip(*lives, strict=True):
            for _ in range(2):
                assert run.step() == pytest.approx(plain.step(), rel=1e-4)
        failures = [event for event in run.events if isinstance(event, CompileFailed)]
        assert failures
        assert failures[0].blueprint == "wrong"
        assert told in failures[0].error
        for number in range(4):
            path = ("second", "first")[number % 2]
            if run.slots[path].stage is not SeedStage.GERMINATED:
                run.slots[path].germinate("wrong")
            run.step()
        assert any(isinstance(event, BreakerChanged) for event in run.events)


def test_a_module_of_the_host_that_does_not_compile_runs_as_it_is() -> None:
    run, plain = Run(compiled=False), Run(compiled=False)
    forward = Block.forward

    class Broken(Block):
        def forward(self, features: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return forward(self, features)

    run.host.second.__class__ = Broken
    run.compiled = CompiledHost(run.slots, backend="aot_eager")
    for _ in range(2):
        assert run.step() == pytest.approx(plain.step(), rel=1e-4)
    (event,) = run.events
    assert (event.place, event.blueprint) == ("second", None)


@pytest.mark.parametrize(
    ("samples", "counted"),
    [(5, False), (4, False), (5, True)],
    ids=["at once", "for another shape", "after a step that was counted"],
)
def test_a_module_of_the_host_whose_backward_does_not_compile_runs_as_it_is(
    samples: int, *, counted: bool
) -> None:
    def compiled(graph: torch.fx.GraphModule, _: object) -> Any:
        return make_boxed_func(graph.forward)

    def killed(graph: torch.fx.GraphModule, inputs: object) -> Any:
        if run.samples == samples:
            raise RuntimeError("the compiler was killed")
        return compiled(graph, inputs)

    backend = aot_autograd(fw_compiler=compiled, bw_compiler=killed)
    run, plain = Run(compiled=True, backend=backend), Run(compiled=False)
    if counted:
        with torch.compiler.set_stance("force_eager"), flop_counter():
            run.step()
        plain.step()
    for number in (5, 4, 5):
        run.samples = plain.samples = number
        assert run.step() == pytest.approx(plain.step(), rel=1e-4)
    assert [event.place for event in run.events] == ["first", "second"]
    assert "the compiler was killed" in run.events[0].error


def tripled(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return 3.0 * output


def positive(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].abs(),)


def tripled_backward(_module: nn.Module, inputs: tuple[Tensor], _: object) -> tuple[Tensor]:
    return (3.0 * inputs[0],)


def add_hook(kind: str, module: nn.Module) -> None:
    if kind == "forward":
        module.register_forward_hook(tripled)
    elif kind == "before":
        module.register_forward_pre_hook(positive)
    else:
        module.register_full_backward_hook(tripled_backward)


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize(
    ("kind", "moment", "fails"),
    [
        ("forward", "before compiling", False),
        ("before", "before compiling", False),
        ("backward", "before compiling", True),
        ("forward", "before the first step", False),
        ("forward", "after the first step", True),
        ("before", "after the first step", True),
        ("backward", "after the first step", True),
    ],
)
def test_a_hook_inside_of_a_module_of_the_host_runs_and_no_equal_module_has_it(
    kind: str, moment: str, fails: bool, place: str
) -> None:
    run, plain = Run(compiled=False), Run(compiled=False)
    inner = [getattr(each.host, place).norm for each in (run, plain)]
    if moment == "before compiling":
        add_hook(kind, inner[0])
    run.compiled = CompiledHost(run.slots, backend="aot_eager")
    if moment == "before the first step":
        add_hook(kind, inner[0])
    elif moment == "after the first step":
        assert run.step() == pytest.approx(plain.step(), rel=1e-4)
        add_hook(kind, inner[0])
    add_hook(kind, inner[1])
    for _ in range(3):
        assert run.step() == pytest.approx(plain.step(), rel=1e-4)
    assert [event.place for event in run.events] == ([place] if fails else [])


def test_a_hook_of_a_module_that_was_put_in_anothers_place_runs() -> None:
    run, plain = Run(compiled=True), Run(compiled=False)
    for each in (run, plain):
        each.step()
        each.host.first.norm = nn.BatchNorm2d(WIDTH)
        add_hook("forward", each.host.first.norm)
    for _ in range(2):
        assert run.step() == pytest.approx(plain.step(), rel=1e-4)
    assert [event.place for event in run.events] == ["first"]


def norms_tripled(module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
    return 3.0 * output if isinstance(module, nn.BatchNorm2d) else None


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_of_every_module_runs_inside_of_a_module_of_the_host(late: bool) -> None:
    run, plain = Run(compiled=True), Run(compiled=False)
    if late:
        assert run.step() == pytest.approx(plain.step(), rel=1e-4)
    hook = nn.modules.module.register_module_forward_hook(norms_tripled)
    try:
        for _ in range(2):
            assert run.step() == pytest.approx(plain.step(), rel=1e-4)
    finally:
        hook.remove()
    assert [event.place for event in run.events] == (["first", "second"] if late else [])


@pytest.mark.parametrize("counted", [0, 1])
def test_a_step_whose_operations_are_counted_leaves_the_host_compiled(counted: int) -> None:
    run = Run(compiled=True)
    for number in range(3):
        if number == counted:
            # It follows modules by hooks of every module.
            with torch.compiler.set_stance("force_eager"), flop_counter():
                run.step()
        else:
            run.step()
    assert run.events == []
    assert graphs() == 1


def test_a_hook_that_is_gone_again_leaves_the_module_compiled() -> None:
    run = Run(compiled=True)
    run.step()
    before = graphs()
    handle = run.host.first.convolution.register_forward_hook(lambda *_: None)
    run.step()
    (told,) = run.events
    assert "modules in it have other hooks than in its first step" in told.error
    handle.remove()
    calls = counters["aot_autograd"]["ok"]
    run.step()
    assert (graphs(), counters["aot_autograd"]["ok"]) == (before, calls)
    assert len(run.events) == 1


def test_equal_seeds_of_which_one_has_hooks_are_compiled_each() -> None:
    calls: list[str] = []
    run = Run(compiled=True)
    for slot in run.slots.values():
        slot.germinate("conv_light")
        slot.advance(force=True)
    hooked = run.slots["second"].seed.convolutions[0]
    hooked.register_forward_hook(lambda *_: calls.append("second"))
    run.step()
    assert [type(event) for event in run.events] == [SeedCompiled, SeedCompiled]
    calls.clear()
    run.step()
    assert calls == ["second"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "max-speed"}, "Unrecognized mode=max-speed"),
        ({"backend": "inducktor"}, "Invalid backend: 'inducktor'"),
        ({"options": {"no_such": True}}, "Unexpected optimization option no_such"),
        ({"mode": "default", "options": {"max_autotune": True}}, "Either mode or options"),
    ],
)
def test_options_that_torch_refuses_are_refused_before_a_step(
    options: dict[str, Any], error: str
) -> None:
    run = Run(compiled=False)
    with pytest.raises(RuntimeError, match=error):
        CompiledHost(run.slots, **options)
    assert not any("forward" in vars(part) for part in run.host.modules())


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_what_only_holds_modules_is_no_module_to_compile_and_those_in_it_are(kind: type) -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = {str(number): Block() for number in range(3)}
            self.stem = nn.Conv2d(3, WIDTH, 1)
            self.blocks = kind(blocks if kind is nn.ModuleDict else blocks.values())

        def forward(self, features: Tensor) -> Tensor:
            features = self.stem(features)
            for block in self.blocks.children():
                features = block(features)
            return features

    slots = esper.attach(Holding(), ["stem"], example=BATCHES[0])
    compiled = CompiledHost(slots, backend="eager")
    assert [region.path for region in compiled.regions] == ["blocks.0", "blocks.1", "blocks.2"]
    slots.model(BATCHES[0])
    assert graphs() == 1


def loaded(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 – of this very process


@pytest.mark.parametrize(
    "again", [copy.deepcopy, loaded, lambda model: model], ids=["copied", "pickled", "itself"]
)
def test_a_host_that_was_compiled_and_not_released_is_compiled_again(
    again: Callable[[nn.Module], nn.Module],
) -> None:
    run = Run(compiled=True)
    host = again(run.host)
    esper.detach(host)
    assert not any("forward" in vars(part) for part in host.modules())
    slots = esper.attach(host, ["first", "second"], example=BATCHES[0])
    compiled = CompiledHost(slots, backend="eager")
    assert [region.path for region in compiled.regions] == ["first", "second"]


def test_releasing_what_another_one_took_over_from_leaves_that_compiling() -> None:
    run = Run(compiled=True)
    released = run.compiled
    run.compiled = CompiledHost(run.slots, backend="aot_eager")
    run.slots["first"].germinate("norm")
    run.prepare()
    released.release()
    run.step()
    assert [type(event) for event in run.events] == [SeedCompiled]


def test_a_copy_of_a_compiled_module_is_compiled_in_another_host_too() -> None:
    block: nn.Module = Block()
    for _ in range(3):
        block = copy.deepcopy(block)
        host = nn.Sequential(nn.Conv2d(3, WIDTH, 1), block)
        slots = esper.attach(host, ["0"], example=BATCHES[0])
        compiled = CompiledHost(slots, backend="eager")
        assert [region.path for region in compiled.regions] == ["1"]


class Layer(nn.Module):
    """Divides by a number of its own, and by how often it was called."""

    def __init__(self, number: int, *, counts: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.number = number
        self.counts = counts
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        return features + self.linear(features) / (self.number + self.calls)


def layered(layers: int, *, counts: bool) -> tuple[nn.Sequential, CompiledHost]:
    torch.manual_seed(0)
    places = [Layer(number, counts=counts) for number in range(1, layers + 1)]
    host = nn.Sequential(nn.Linear(4, 4), *places)
    slots = esper.attach(host, ["0"], example=BATCHES.flatten()[:8].view(2, 4))
    return host, CompiledHost(slots, backend="eager")


def test_modules_that_differ_by_more_numbers_than_graphs_are_kept_are_compiled_each() -> None:
    host, compiled = layered(12, counts=False)
    features = BATCHES.flatten()[:20].view(5, 4)
    found = host(features)
    assert compiled.prepare() == []
    assert graphs() == 12
    compiled.release()
    torch.testing.assert_close(found, host(features))


def test_a_module_that_meets_the_limit_of_graphs_runs_as_it_is_from_then_on() -> None:
    (host, compiled), (plain, released) = layered(2, counts=True), layered(2, counts=True)
    released.release()
    for features in BATCHES.flatten()[: 14 * 20].view(14, 5, 4):
        torch.testing.assert_close(host(features), plain(features))
    failed = compiled.prepare()
    assert [(type(event), event.place) for event in failed] == [
        (CompileFailed, "1"),
        (CompileFailed, "2"),
    ]
    assert [layer.calls for layer in host[1:]] == [layer.calls for layer in plain[1:]]
    before = graphs()
    host(features)
    assert graphs() == before


@pytest.mark.parametrize("count_flops", [False, True])
def test_the_trainer_compiles_ahead_and_counts_what_it_would_count(count_flops: bool) -> None:
    runs = []
    for compiled in (False, True):
        problem = make_problem(config=SlotConfig(ramp_steps=4))
        host = CompiledHost(problem.slots, backend="aot_eager") if compiled else None
        policy = esper.PlannedPolicy({1: [Germinate(slot="embed", blueprint="mlp")]})
        trainer = problem.trainer(policy, epochs=4, count_flops=count_flops, compiled=host)
        runs.append((problem, [report.train_loss for report in trainer.run()], trainer))
    (_, plain, eager), (problem, losses, trainer) = runs
    assert losses == pytest.approx(plain, rel=1e-3)
    assert trainer.growth.meter.cost.training.flops == eager.growth.meter.cost.training.flops
    (event,) = problem.recorder.of(SeedCompiled)
    assert (event.slot, event.kinds) == ("embed", 2)
    assert problem.slots["embed"].measurements.prewarm_ms >= event.milliseconds
