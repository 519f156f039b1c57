"""A copy of a host's block as a seed: exact identity at birth, the block itself at gain 1."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.seeds import Family, blueprints
from esper.seeds.copied_block import CopiedBlockSeed


class ResidualBlock(nn.Module):
    """A block as CNNs have it: BatchNorm, in-place ReLU, dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.relu_first = nn.ReLU(inplace=True)
        self.convolution = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(0.5, inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.dropout(self.norm(self.convolution(self.relu_first(features))))


class TokenBlock(nn.Module):
    """A block as language models have it: takes a mask and returns a tuple."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor, *, shift: float) -> tuple[Tensor, None]:
        return tokens + self.linear(tokens) * mask + shift, None


def test_a_copy_is_the_identity_at_birth_and_the_block_at_gain_one():
    torch.manual_seed(0)
    block = ResidualBlock(4)
    block.norm.running_mean.uniform_(-1.0, 1.0)
    block.norm.running_var.uniform_(0.5, 2.0)
    seed = blueprints.create(Family.CNN, "block", 4, source=copy.deepcopy(block))
    features = torch.randn(2, 4, 5, 5)
    untouched = features.clone()
    for training in (True, False):
        assert torch.equal(seed.train(training)(features), features)
        assert torch.equal(features, untouched)
    (gain,) = seed.output_layers
    torch.nn.init.ones_(gain.weight)
    block.relu_first.inplace = False
    torch.testing.assert_close(seed.eval()(features), block.eval()(features))


def test_a_copy_holds_no_state_that_a_step_changes():
    torch.manual_seed(0)
    seed = blueprints.create(Family.CNN, "block", 4, source=ResidualBlock(4))
    torch.nn.init.ones_(seed.output_layers[0].weight)
    before = {name: buffer.clone() for name, buffer in seed.named_buffers()}
    seed.eval()
    seed.train()
    seed(torch.randn(2, 4, 5, 5)).sum().backward()
    assert before
    for name, buffer in seed.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert seed.block.dropout.training  # type: ignore[union-attr]
    assert seed.block.convolution.weight.grad is not None  # type: ignore[union-attr]


class Norm(nn.GroupNorm):
    """A GroupNorm of a library's own."""


class Normalised(nn.Module):
    """Calls its norm by position or by name."""

    def __init__(self, norm: nn.GroupNorm, *, by_name: bool) -> None:
        super().__init__()
        self.norm, self.by_name = norm, by_name

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(input=features) if self.by_name else self.norm(features)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("norm", [nn.GroupNorm, Norm])
def test_a_group_norm_in_a_copy_gets_no_input_that_ends_the_process(
    norm: type[nn.GroupNorm], *, by_name: bool, monkeypatch: pytest.MonkeyPatch
):
    """The backward of torch's own does, for channels-last features that need no gradient."""
    block = nn.Sequential(Normalised(norm(2, 4), by_name=by_name), nn.Conv2d(4, 4, 1))
    seed = blueprints.create(Family.CNN, "block", 4, source=block, depth=2)
    layouts = []
    normalise = F.group_norm

    def watched(features: Tensor, *args: Any) -> Tensor:
        layouts.append(features.is_contiguous() or features.requires_grad)
        return normalise(features, *args)

    monkeypatch.setattr(F, "group_norm", watched)
    features = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    increment = seed.increment(features)
    assert layouts == [True, True]
    increment.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_copy_reads_the_arguments_of_the_call(checkpointing: bool):
    torch.manual_seed(0)
    block = TokenBlock(4)
    seed = blueprints.create(
        Family.TRANSFORMER, "block", 4, source=copy.deepcopy(block), checkpointing=checkpointing
    )
    assert isinstance(seed, CopiedBlockSeed)
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([1.0, 0.0, 1.0])[:, None]
    assert torch.count_nonzero(seed.increment(tokens, mask, shift=2.0)) == 0
    torch.nn.init.ones_(seed.output_layers[0].weight)
    increment = seed.increment(tokens, mask, shift=2.0)
    torch.testing.assert_close(tokens + increment, block(tokens, mask, shift=2.0)[0])
    increment.sum().backward()
    assert seed.block.linear.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("family", list(Family))
def test_what_contradicts_a_copy_is_refused(family: Family):
    with pytest.raises(TypeError, match=r"source must be a module .* got 'layer3'"):
        blueprints.create(family, "block", 4, source="layer3")
    with pytest.raises(ValueError, match=r"a copy takes .* from its source"):
        blueprints.create(family, "block", 4, source=nn.Identity(), expansion=2)
