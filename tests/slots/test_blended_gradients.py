"""What a blended seed computes, against hand-written modules.

Legend: h host features, f the seed's increment, u the operator's, a alpha. The slot's output is
h + a * u; isolated, the seed reads h without its graph.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.alpha import BlendOperator
from esper.lifecycle.learning import Isolation
from esper.slots import SeedSlot
from esper.slots.branch import SeedBranch

OPERATORS = list(BlendOperator)
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def increment(branch: SeedBranch, host: Tensor, seed_input: Tensor) -> Tensor:
    """u, written out by hand."""
    f = branch.seed.increment(seed_input)
    if branch.blend_operator is BlendOperator.MULTIPLY:
        return host * torch.tanh(f)
    if branch.blend_operator is BlendOperator.GATE:
        assert branch.gate is not None
        weight, bias = branch.gate.linear.weight, branch.gate.linear.bias
        if branch.gate.channels_first:
            return f * torch.sigmoid(seed_input.mean((2, 3)) @ weight.T + bias)[:, :, None, None]
        return f * torch.sigmoid(seed_input @ weight.T + bias)
    return f


class Pair:
    """Two host layers with a slot between, and the same written out."""

    def __init__(self, layout: str, operator: BlendOperator, isolation: Isolation) -> None:
        torch.manual_seed(0)
        shape = {"B C H W": (4, 3, 5, 5), "B T D": (4, 5, 3), "B D": (4, 3)}[layout]
        layer = nn.Conv2d(3, 3, 1) if layout == "B C H W" else nn.Linear(3, 3)
        self.model = nn.Sequential(layer, nn.Tanh(), nn.Linear(shape[-1], 2)).double()
        self.inputs = torch.randn(shape, dtype=torch.float64)
        config = SlotConfig(blend_operator=operator, isolation=isolation)
        self.slots = esper.attach(self.model, "0", example=self.inputs, config=config)
        self.blueprint = "conv_light" if layout == "B C H W" else "mlp"

    @property
    def slot(self) -> SeedSlot:
        return self.slots["0"]

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad(
            output.square().sum(), list(parameters.values()), allow_unused=True
        )
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
        }

    def by_hand(self, mix: Callable[[SeedBranch, Tensor], Tensor]) -> Tensor:
        first, between, last = self.model[0], self.model[1], self.model[2]
        weight, bias = first.weight, first.bias
        if isinstance(first, nn.Conv2d):
            host = torch.nn.functional.conv2d(self.inputs, weight, bias)
        else:
            host = torch.nn.functional.linear(self.inputs, weight, bias)
        branch = self.slot.branches[0]
        return last(between(mix(branch, host)))


def blended(alpha: float, *, isolated: bool) -> Callable[[SeedBranch, Tensor], Tensor]:
    def mix(branch: SeedBranch, host: Tensor) -> Tensor:
        return host + alpha * increment(branch, host, host.detach() if isolated else host)

    return mix


LAYOUTS = ["B C H W", "B T D", "B D"]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("isolation", [Isolation.TRAINING, Isolation.SHADOWING])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_upstream_of_a_blended_seed_learns_as_by_hand(
    layout: str,
    operator: BlendOperator,
    isolation: Isolation,
    alpha: float,
    grow: Any,
    randomise: Any,
) -> None:
    pair = Pair(layout, operator, isolation)
    grow(pair.slot, pair.blueprint, SeedStage.BLENDING)
    randomise(pair.slot.living)
    if alpha > 0:
        pair.slot.set_alpha_target(alpha, 0)

    output = pair.model(pair.inputs)
    expected = pair.by_hand(blended(alpha, isolated=isolation is Isolation.SHADOWING))

    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    found, wanted = pair.gradients(output), pair.gradients(expected)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12, msg=name)
    assert found["0.weight"].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operator_is_the_identity_at_alpha_zero(
    layout: str, operator: BlendOperator, dtype: torch.dtype, grow: Any, randomise: Any
) -> None:
    pair = Pair(layout, operator, Isolation.SHADOWING)
    pair.model.to(dtype)
    inputs = pair.inputs.to(dtype)
    plain = pair.model(inputs)
    grow(pair.slot, pair.blueprint, SeedStage.BLENDING)
    randomise(pair.slot.living)

    assert torch.equal(pair.model(inputs), plain)
    pair.slot.set_alpha_target(0.5, 0)
    assert not torch.equal(pair.model(inputs), plain)


@pytest.mark.parametrize("isolation", list(Isolation))
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_seed_on_trial_and_a_committed_one_equal_the_inlined_module(
    layout: str, operator: BlendOperator, isolation: Isolation, grow: Any, randomise: Any
) -> None:
    pair = Pair(layout, operator, isolation)
    grow(pair.slot, pair.blueprint, SeedStage.PROBATIONARY)
    randomise(pair.slot.living)

    def check() -> Tensor:
        output = pair.model(pair.inputs)
        expected = pair.by_hand(lambda branch, host: host + increment(branch, host, host))
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        found, wanted = pair.gradients(output), pair.gradients(expected)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12, msg=name)
        return output

    on_trial = check()
    pair.slot.commit()
    assert pair.slot.stage is SeedStage.FOSSILIZED
    assert torch.equal(check(), on_trial)
    pair.model.eval()
    assert torch.equal(pair.model(pair.inputs), on_trial)


def test_a_seed_of_the_same_math_inlined_by_hand_is_bitwise_the_committed_one(
    host: Any, grow: Any, randomise: Any, bits_of: Any
) -> None:
    model = host.build()
    slots = esper.attach(model, host.targets[0], example=host.inputs())
    slot = slots[host.targets[0]]
    grow(slot, host.blueprint, SeedStage.FOSSILIZED)
    randomise(slot.branches)

    inlined = host.build()
    seed = slot.branches[0].seed
    target = inlined.get_submodule(host.targets[0])
    target.register_forward_hook(lambda module, args, output: seed(output))
    for mode in (True, False):
        torch.manual_seed(0)
        wanted = inlined.train(mode)(host.inputs())
        torch.manual_seed(0)
        assert bits_of(model.train(mode)(host.inputs())) == bits_of(wanted)


@pytest.mark.parametrize("layout", ["B C H W", "B D", "B T D"])
def test_seeds_are_inserted_live_unless_isolation_is_asked_for(layout: str) -> None:
    pair = Pair(layout, BlendOperator.ADD, Isolation.TRAINING)
    assert pair.slot.isolation is Isolation.TRAINING
    esper.detach(pair.model)
    slots = esper.attach(pair.model, "0", example=pair.inputs)
    assert slots["0"].isolation is Isolation.NONE


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_features_keep_the_hosts_dtype_under_autocast(
    host: Any, operator: BlendOperator, device: str, advance_to: Any, randomise: Any
) -> None:
    model, inputs = host.build().to(device), host.inputs().to(device)
    config = SlotConfig(blend_operator=operator)
    slots = esper.attach(model, host.targets, example=inputs, config=config)
    seen: list[torch.dtype] = []
    for path in host.targets:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output: seen.append(output.dtype)
        )
    with torch.autocast(device, dtype=torch.bfloat16):
        model(inputs)
        plain, seen[:] = list(seen), []
        for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY):
            for slot in slots.values():
                if slot.living is None:
                    slot.germinate(host.blueprint)
                    randomise(slot.living)
                advance_to(slot, stage)
                if stage is SeedStage.BLENDING:
                    slot.set_alpha_target(0.5, 0)
            model(inputs)
            assert seen == plain, stage
            seen.clear()
