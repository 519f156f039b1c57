"""Every blueprint in a slot: invisible while it learns, plain once it is committed."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.learning import Isolation
from esper.seeds import Family, blueprints

BLUEPRINTS = [(family, name) for family in Family for name in blueprints.names(family)]
every_blueprint = pytest.mark.parametrize(("family", "name"), BLUEPRINTS)


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images)).flatten(1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(tokens))).flatten(1)


def problem(family: Family) -> tuple[nn.Module, Tensor]:
    if family is Family.CNN:
        return Maps(), torch.randn(4, 3, 6, 5)
    return Tokens(), torch.randn(4, 6, 3)


@pytest.fixture(autouse=True)
def _fixed_random_stream() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def steps(model: nn.Module, inputs: Tensor, number: int = 3) -> list[Tensor]:
    """Return the host's outputs and gradients, bit for bit, over some steps."""
    own = [parameter for name, parameter in model.named_parameters() if "esper_slot" not in name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor] = []
    for _ in range(number):
        output = model(inputs)
        output.square().sum().backward()
        seen += [output.detach().clone(), *(parameter.grad.clone() for parameter in own)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize(
    ("family", "name", "layout"),
    [(*row, "contiguous") for row in BLUEPRINTS]
    + [(Family.CNN, name, "channels_last") for name in blueprints.names(Family.CNN)],
)
def test_a_training_seed_leaves_every_bit_of_the_host_alone(
    family: Family, name: str, layout: str, randomise: Callable[..., None], grow: Any
):
    model, inputs = problem(family)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.to(memory_format=torch.channels_last)
    alone = copy.deepcopy(model)
    config = SlotConfig(isolation=Isolation.SHADOWING)
    slot = esper.attach(model, "stem", example=inputs, config=config)["stem"]
    grow(slot, name, SeedStage.TRAINING)
    randomise(slot.seed)
    assert all(map(torch.equal, steps(model, inputs), steps(alone, inputs)))


@every_blueprint
def test_a_committed_seed_is_the_inlined_module_baked_and_exported(
    family: Family, name: str, randomise: Callable[..., None], grow: Any
):
    model, inputs = problem(family)
    host = copy.deepcopy(model)
    slot = esper.attach(model, "stem", example=inputs)["stem"]
    grow(slot, name, SeedStage.FOSSILIZED)
    randomise(slot.branches)
    inlined = copy.deepcopy(slot.branches[0].seed)
    for part in (model, host, inlined):
        part.eval()
    expected = host.head(
        inlined(host.stem(inputs))
        if family is Family.CNN
        else torch.tanh(inlined(host.stem(inputs)))
    ).flatten(1)
    assert torch.equal(model(inputs), expected)
    plain = esper.bake(model)
    assert torch.equal(plain(inputs), expected)
    program = torch.export.export(plain, (inputs,))
    torch.testing.assert_close(program.module()(inputs), expected)


# torch's own tracer instantiates what it warns of
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@every_blueprint
def test_a_slot_is_traced_in_one_graph(
    family: Family, name: str, randomise: Callable[..., None], grow: Any
):
    model, inputs = problem(family)
    slot = esper.attach(model, "stem", example=inputs)["stem"]
    grow(slot, name, SeedStage.TRAINING)
    randomise(slot.seed)
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, eager):
        run(inputs).square().sum().backward()
        which = model if run is compiled else eager
        results.append([parameter.grad for parameter in which.parameters()])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_blueprint
def test_on_a_gpu_a_seed_is_the_identity_and_leaves_the_host_alone(
    family: Family, name: str, randomise: Callable[..., None], grow: Any
):
    model, inputs = problem(family)
    model, inputs = model.cuda().eval(), inputs.cuda()
    alone = copy.deepcopy(model)
    config = SlotConfig(isolation=Isolation.SHADOWING)
    slot = esper.attach(model, "stem", example=inputs, config=config)["stem"]
    grow(slot, name, SeedStage.PROBATIONARY)
    assert torch.equal(model(inputs), alone(inputs))
    slot.prune()
    while slot.stage is not SeedStage.DORMANT:
        slot.advance(force=True)
    model.train()
    alone.train()
    grow(slot, name, SeedStage.TRAINING)
    randomise(slot.seed)
    torch.testing.assert_close(steps(model, inputs), steps(alone, inputs))
