"""A host compiled module by module: what it computes, how many graphs, and who waits for them."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import esper
from compiled_run import BATCHES, Block, Run, Wrong, graphs
from esper import SeedStage, SlotConfig
from esper.compilation import CompiledHost
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import BreakerChanged, CompileFailed, SeedCompiled
from esper.seeds import Seed, blueprints
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
    assert not any(
        "forward" in vars(part) and part in set(run.host.modules()) for part in plain.modules()
    )
    run.host.train()
    assert run.compiled is not None
    run.compiled.release()
    assert not any("forward" in vars(part) for part in run.host.modules())


@pytest.mark.parametrize("raises", [False, True], ids=["miscomputes", "does not compile"])
def test_what_the_compiler_cannot_do_runs_as_it_is(raises: bool) -> None:
    with blueprints.temporarily():

        @blueprints.register("wrong", family="cnn")
        def wrong(dim: int) -> Seed:
            """Compiled, it is another one."""
            return Wrong(dim, raises=raises)

        plain, run = Run(compiled=False), Run(compiled=True)
        lives = [r.live("first", "wrong") for r in (plain, run)]
        for _ in zip(*lives, strict=True):
            for _ in range(2):
                assert run.step() == pytest.approx(plain.step(), rel=1e-4)
        failures = [event for event in run.events if isinstance(event, CompileFailed)]
        assert failures
        assert failures[0].blueprint == "wrong"
        assert ("differs by" in failures[0].error) is not raises
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


@pytest.mark.parametrize("count_flops", [False, True])
def test_the_trainer_compiles_ahead_and_counts_what_it_would_count(count_flops: bool) -> None:
    runs = []
    for compiled in (False, True):
        problem = make_problem(config=SlotConfig(ramp_steps=4))
        host = CompiledHost(problem.slots, backend="aot_eager") if compiled else None
        policy = esper.SchedulePolicy({1: [Germinate(slot="embed", blueprint="mlp")]})
        trainer = problem.trainer(policy, epochs=4, count_flops=count_flops, compiled=host)
        runs.append((problem, [report.train_loss for report in trainer.run()], trainer))
    (_, plain, eager), (problem, losses, trainer) = runs
    assert losses == pytest.approx(plain, rel=1e-3)
    assert trainer.growth.meter.cost.training.flops == eager.growth.meter.cost.training.flops
    (event,) = problem.recorder.of(SeedCompiled)
    assert (event.slot, event.kinds) == ("embed", 2)
    assert problem.slots["embed"].measurements.prewarm_ms >= event.milliseconds
