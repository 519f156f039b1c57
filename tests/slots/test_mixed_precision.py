"""Hosts whose features have another dtype than their parameters.

Legend: B batch, C channels, H height, W width, T tokens, D features.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedStage
from esper.lifecycle.alpha import BlendOperator

WIDTH = 8
HALF = torch.bfloat16


def autocast(*, on: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=HALF) if on else nullcontext()


class Block(nn.Module):
    """Shape-keeping tokens or maps, under autocast of its own if it is told so."""

    def __init__(self, layer: nn.Module, *, autocasts: bool) -> None:
        super().__init__()
        self.layer = layer
        self.autocasts = autocasts

    def forward(self, features: Tensor) -> Tensor:
        with autocast(on=self.autocasts):
            return torch.tanh(self.layer(features))


class AutocastingHost(nn.Module):
    """Autocasts in its own forward: around everything, or inside each block only."""

    def __init__(self, kind: str, *, inside_blocks: bool) -> None:
        super().__init__()
        self.inside_blocks = inside_blocks
        if kind == "tokens":
            self.stem: nn.Module = nn.Linear(3, WIDTH)
            layer: nn.Module = nn.Linear(WIDTH, WIDTH)
        else:
            self.stem = nn.Conv2d(3, WIDTH, 1)
            layer = nn.Conv2d(WIDTH, WIDTH, 1)
        self.block = Block(layer, autocasts=inside_blocks)

    def forward(self, inputs: Tensor) -> Tensor:
        with autocast(on=not self.inside_blocks):
            return self.block(self.stem(inputs))


INPUTS = {"tokens": torch.randn(4, 5, 3), "maps": torch.randn(4, 3, 5, 5)}


@pytest.mark.parametrize("inside_blocks", [False, True])
@pytest.mark.parametrize(
    ("kind", "blueprint", "options"),
    [
        ("tokens", "mlp", {}),
        ("tokens", "attention", {"heads": 2}),
        ("tokens", "block", {"source": "own"}),
        ("maps", "conv_light", {}),
        ("maps", "block", {"source": "own"}),
    ],
)
@pytest.mark.parametrize("operator", list(BlendOperator))
def test_seeds_in_a_host_that_autocasts_are_as_wide_as_its_parameters(
    inside_blocks: bool,
    kind: str,
    blueprint: str,
    options: dict[str, Any],
    operator: BlendOperator,
    advance_to: Any,
    randomise: Any,
) -> None:
    torch.manual_seed(0)
    host, inputs = AutocastingHost(kind, inside_blocks=inside_blocks), INPUTS[kind]
    slots = esper.attach(host, "block", example=inputs)
    slots.bind(torch.optim.SGD(host.parameters(), lr=0.1))
    (slot,) = slots.values()
    assert slot.layout.cast is inside_blocks
    without = host(inputs)
    slot.germinate(blueprint, blend_operator=operator, **options)
    assert {parameter.dtype for parameter in slot.branches.parameters()} == {torch.float32}
    advance_to(slot, SeedStage.TRAINING)
    trained = host(inputs)
    assert torch.equal(trained, without)
    assert trained.dtype is HALF
    trained.float().square().mean().backward()
    (changed,) = {p.grad.dtype for p in slot.seed.parameters() if p.grad is not None}
    assert changed is torch.float32
    randomise(slot.branches)
    outputs = []
    for stage in (SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
        advance_to(slot, stage)
        if stage is SeedStage.BLENDING:
            slot.set_alpha_target(1.0, 0)
        outputs.append(host(inputs))
        assert outputs[-1].dtype is HALF
    outputs.append(esper.bake(host)(inputs))
    assert not torch.equal(outputs[0], without)
    assert all(torch.equal(output, outputs[1]) for output in outputs[2:])
    if operator is BlendOperator.ADD:
        with autocast(on=not inside_blocks):
            features = without if not inside_blocks else without.float()
            increment = slot.branch(0).seed.increment(features)
        assert torch.equal(outputs[1], without + increment.to(HALF))


def test_a_copy_under_autocast_is_the_block_itself_at_gain_one() -> None:
    host, inputs = AutocastingHost("tokens", inside_blocks=False), INPUTS["tokens"]
    (slot,) = esper.attach(host, "block", example=inputs).values()
    slot.germinate("block", source="own")
    for original, copied in zip(
        host.block.layer.parameters(), slot.seed.block.layer.parameters(), strict=True
    ):
        assert torch.equal(original, copied)


def test_seeds_are_wide_where_attach_itself_runs_under_autocast() -> None:
    host = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU())
    with autocast(on=True):
        slots = esper.attach(host, "*", example=torch.randn(4, 3))
        for slot in slots.values():
            slot.germinate("mlp")
            slot.advance(force=True)
            assert next(slot.seed.parameters()).dtype is torch.float32
        assert host(torch.randn(4, 3)).dtype is HALF


def test_seeds_are_as_wide_as_the_parameters_there_and_not_elsewhere() -> None:
    host, inputs = AutocastingHost("tokens", inside_blocks=False), INPUTS["tokens"]
    host.stem.to(HALF)
    slots = esper.attach(host, ["stem", "block"], example=inputs)
    assert slots["stem"].blend_alpha.dtype is HALF
    assert slots["block"].blend_alpha.dtype is torch.float32


@pytest.mark.parametrize("target", ["0", "1", "2"])
def test_seeds_in_a_half_precision_host_have_its_dtype(target: str) -> None:
    host = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU()).to(HALF)
    host[1].float()  # as libraries keep the statistics
    (slot,) = esper.attach(host, target, example=torch.randn(2, 3, 4, 4, dtype=HALF)).values()
    slot.germinate("conv_light")
    assert next(slot.seed.parameters()).dtype is HALF


def test_a_copy_of_a_block_of_mixed_precision_has_the_dtypes_of_its_original() -> None:
    class Wide(nn.Linear):
        """Computes in the dtype of its weights, as routers and some norms do."""

        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features.to(self.weight.dtype)).to(features.dtype)

    host = nn.Sequential(nn.Linear(3, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH))).to(HALF)
    host[1].append(Wide(WIDTH, WIDTH))
    (slot,) = esper.attach(host, "1", example=INPUTS["tokens"].to(HALF)).values()
    slot.germinate("block", source="own")
    originals = [p for name, p in host[1].named_parameters() if "esper" not in name]
    copies = list(slot.seed.block.parameters())
    assert {parameter.dtype for parameter in copies} == {HALF, torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(originals, copies, strict=True))
    assert [parameter.dtype for parameter in slot.seed.gain.parameters()] == [HALF]


def test_seeds_in_an_autocasting_host_compile_whole(grow: Any, randomise: Any) -> None:
    host, inputs = AutocastingHost("tokens", inside_blocks=True), INPUTS["tokens"]
    (slot,) = esper.attach(host, "block", example=inputs).values()
    grow(slot, "mlp", SeedStage.PROBATIONARY)
    randomise(slot.branches)
    expected = host(inputs)
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), expected)
