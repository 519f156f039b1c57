"""A host that its user compiles full-graph: how many graphs a slot's life costs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import esper
from esper import SeedSlot, SeedStage, SlotConfig
from esper.lifecycle.learning import Isolation
from esper.slots import IsolationMonitor

pytestmark = pytest.mark.filterwarnings(
    # torch's own tracer instantiates what it warns of
    "ignore:.*Function'> should not be instantiated:DeprecationWarning"
)


class DigitsHost(nn.Module):
    """Two convolutions on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.first_norm(self.first(images))), 2)
        return self.head(F.relu(self.second_norm(self.second(features))).mean(dim=(2, 3)))


TARGETS = ["first_norm", "second_norm"]
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Twins:
    """The same host twice, one of them compiled; every step is taken by both."""

    def __init__(self, counter: Any, **config: Any) -> None:
        self.counter = counter
        self.models, self.slots, self.optimizers = [], [], []
        for _ in range(2):
            torch.manual_seed(0)
            model = DigitsHost()
            slots = esper.attach(
                model,
                TARGETS,
                example=IMAGES,
                config=SlotConfig(**{"isolation": Isolation.SHADOWING, **config}),
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            slots.bind(optimizer)
            self.models.append(model)
            self.slots.append(slots)
            self.optimizers.append(optimizer)
        self.compiled = torch.compile(self.models[1], fullgraph=True, backend=counter)

    def both(self, path: str) -> list[SeedSlot]:
        return [slots[path] for slots in self.slots]

    def germinate(self, path: str, blueprint: str = "conv_light") -> None:
        for slot in self.both(path):
            slot.germinate(blueprint)

    def advance(self, path: str) -> None:
        for slot in self.both(path):
            slot.advance(force=True)

    def step(self) -> int:
        """Train one step and return how many graphs there are by now."""
        for model, slots in zip((self.models[0], self.compiled), self.slots, strict=True):
            slots.shadow_pass(lambda model=model: model(IMAGES).square().mean())
        outputs = [self.models[0](IMAGES), self.compiled(IMAGES)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.square().mean().backward()
        own, compiled = (dict(model.named_parameters()) for model in self.models)
        for name, parameter in own.items():
            if parameter.grad is None:
                assert compiled[name].grad is None, name
                continue
            torch.testing.assert_close(
                compiled[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name
            )
        with torch.no_grad():
            for name, parameter in own.items():
                compiled[name].grad = None if parameter.grad is None else parameter.grad.clone()
        for optimizer, slots in zip(self.optimizers, self.slots, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            slots.tick()
        return int(self.counter.frame_count)


@pytest.mark.parametrize(
    ("operator", "objective"),
    [
        ("add", "proximal"),
        ("gate", "norm_cap"),
        ("multiply", "correlation"),
        ("add", "plain"),
        ("gate", "shadow"),
    ],
)
def test_a_life_costs_one_graph_per_forward_mode_and_none_for_what_returns(
    operator: str, objective: str
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    twins = Twins(counter, blend_operator=operator, objective=objective)
    first, second = TARGETS
    assert twins.step() == 1

    twins.germinate(first)
    assert twins.step() == 1, "GERMINATED"
    twins.advance(first)
    assert twins.step() == 2, "behind the host"
    assert twins.step() == 2
    twins.advance(first)
    assert twins.step() == 3, "blended"
    for slot in twins.both(first):
        slot.set_alpha_target(1.0, 3)
    assert [twins.step() for _ in range(4)] == [3] * 4, "alpha moves"
    twins.advance(first)
    assert twins.step() == 3, "SHADOWING"
    twins.advance(first)
    assert twins.step() == 4, "on trial"
    for slot in twins.both(first):
        slot.commit()
    assert twins.step() == 4, "committed"

    twins.germinate(second)
    assert twins.step() == 4
    twins.advance(second)
    assert twins.step() == 5, "behind the host in the second slot"
    for slot in twins.both(second):
        slot.prune()
    assert twins.step() == 5, "back to a known structure"
    for slots in twins.slots:
        for _ in range(4):
            slots.end_epoch()
    twins.germinate(second)
    twins.advance(second)
    assert twins.step() == 5, "another seed of the same blueprint"
    twins.advance(second)
    for slot in twins.both(second):
        slot.set_alpha_target(1.0, 0)
    assert twins.step() == 6, "blended in the second slot"
    for slot in twins.both(second):
        slot.prune(over_steps=2)
    assert [twins.step() for _ in range(3)] == [6] * 3, "faded out"
    assert all(slot.stage is SeedStage.PRUNED for slot in twins.both(second))


def test_several_seeds_at_once_cost_one_graph_per_combination() -> None:
    twins = Twins(CompileCounter(), blend_operator="multiply")
    for path in TARGETS:
        twins.germinate(path)
        twins.advance(path)
    assert twins.step() == 1
    for path in TARGETS:
        twins.advance(path)
        for slot in twins.both(path):
            slot.set_alpha_target(0.5, 2)
    assert [twins.step() for _ in range(3)] == [2] * 3
    for path in TARGETS:
        twins.advance(path)
        twins.advance(path)
    assert twins.step() == 3
    for path in TARGETS:
        for slot in twins.both(path):
            slot.commit()
    assert twins.step() == 3


def test_alpha_stays_an_input_of_the_graph() -> None:
    twins = Twins(CompileCounter())
    for path in TARGETS:
        twins.germinate(path)
        twins.advance(path)
        twins.advance(path)
    outputs, compiled = [], twins.compiled
    for slot in twins.slots[1].values():
        torch.nn.init.ones_(slot.seed.output_layers[0].weight)
    with torch.no_grad():
        for target in (0.0, 0.5, 1.0):
            for slot in twins.slots[1].values():
                if target > 0.0:
                    slot.set_alpha_target(target, 0)
            outputs.append(compiled(IMAGES))
            torch.testing.assert_close(outputs[-1], twins.models[1](IMAGES), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])
    assert twins.counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize(("backend", "precision"), [("aot_eager", None), ("inductor", "bfloat16")])
def test_checks_of_isolation_cost_no_graph_and_blame_nobody_for_other_fusions(
    backend: str, precision: str | None
) -> None:
    dtype = torch.bfloat16 if precision else None
    twins = Twins(CompileCounterWithBackend(backend))
    monitor = IsolationMonitor(twins.slots[1], interval_steps=1)
    checks = 0

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return twins.compiled(IMAGES).square().mean()

    def graphs(steps: int) -> int:
        for _ in range(steps):
            nonlocal checks
            checks += 1
            monitor.check(loss, step=checks)
            loss().backward()
            twins.optimizers[1].step()
            twins.optimizers[1].zero_grad()
            twins.slots[1].tick()
        return int(twins.counter.frame_count)

    slots = twins.slots[1].values()
    for slot in slots:
        slot.germinate("conv_light")
        slot.advance(force=True)
    assert graphs(5) == 1
    assert [(r.checks, r.violations) for r in monitor.read()] == [(2, 0)] * 2
    for slot in slots:
        slot.advance(force=True)
        slot.set_alpha_target(1.0, 5)
    assert graphs(7) == 2
    assert [(r.checks, r.violations) for r in monitor.read()] == [(3, 0)] * 2

    seed, weight = twins.slots[1][TARGETS[0]].seed, twins.models[1].first.weight
    increment = seed.increment
    seed.increment = lambda features: increment(features) + 1e-2 * weight.sum()
    graphs(2)
    assert [(r.checks, r.violations) for r in monitor.read()] == [(1, 1), (1, 0)]
