"""Several blocks in one seed compute what they compute one after another."""

import copy

import pytest
import torch
from torch import Tensor, nn

from esper.seeds import Family, Seed, blueprints
from esper.seeds.copied_block import FeatureGain
from esper.seeds.noop import NoopSeed
from esper.seeds.stacked import StackedSeed

SHAPES = {Family.CNN: (2, 8, 5, 4), Family.TRANSFORMER: (2, 6, 8)}


class Shifted(nn.Module):
    """A block that reads a mask and a number from the call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, mask: Tensor, *, shift: float) -> Tensor:
        return tokens + torch.tanh(self.linear(tokens)) * mask + shift


def randomised(seed: Seed) -> Seed:
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return seed


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stack_is_its_blocks_one_after_another(family: Family, checkpointing: bool):
    torch.manual_seed(0)
    stack = randomised(blueprints.create(family, "block", 8, depth=3, checkpointing=checkpointing))
    features = torch.randn(SHAPES[family])
    expected = features
    for block in stack.blocks:
        expected = block(expected)
    torch.testing.assert_close(stack(features), expected)
    one = blueprints.create(family, "block", 8)
    assert type(one) is type(stack.blocks[0])
    names = [f"blocks.{n}.{name}" for n in range(3) for name in one.state_dict()]
    assert list(stack.state_dict()) == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stacked_copies_are_the_identity_at_birth_and_the_block_repeated_at_gain_one(
    checkpointing: bool,
):
    torch.manual_seed(0)
    block = Shifted()
    stack = blueprints.create(
        Family.TRANSFORMER,
        "block",
        8,
        source=copy.deepcopy(block),
        depth=2,
        checkpointing=checkpointing,
    )
    tokens, mask = torch.randn(2, 3, 8), torch.tensor([1.0, 0.0, 1.0])[:, None]
    assert torch.count_nonzero(stack.increment(tokens, mask, shift=2.0)) == 0
    first, second = stack.copies
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) and one is not other for one, other in pairs)
    assert len(stack.output_layers) == 2
    for gain in stack.output_layers:
        assert isinstance(gain, FeatureGain)
        torch.nn.init.ones_(gain.weight)
    expected = block(block(tokens, mask, shift=2.0), mask, shift=2.0)
    torch.testing.assert_close(tokens + stack.increment(tokens, mask, shift=2.0), expected)


@pytest.mark.parametrize("family", list(Family))
def test_a_stack_of_no_block_is_refused(family: Family):
    for source in (None, nn.Identity()):
        with pytest.raises(ValueError, match="block: depth must be at least 1, got 0"):
            blueprints.create(family, "block", 8, source=source, depth=0)


def test_a_stack_prepares_its_blocks():
    prepared = []

    class Preparing(NoopSeed):
        def prepare(self, shape: tuple[int, ...], device: torch.device) -> None:
            prepared.append(shape)

    StackedSeed([Preparing(), Preparing()]).prepare((2, 6, 8), torch.device("cpu"))
    assert prepared == [(2, 6, 8)] * 2
