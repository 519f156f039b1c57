"""Features of 1-d convolutions, `B C T`, are told from `B T D`, where slots can stand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import esper

C, T = 6, 9


class Does(nn.Module):
    """Runs a function of its inner module and the input; the slot stands behind this one."""

    def __init__(
        self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)
    ) -> None:
        super().__init__()
        self.inner = inner
        self.run = run

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self.inner, inputs)


class Chomp(nn.Module):
    """Cuts off what a padded convolution made beyond its input."""

    def forward(self, features: Tensor) -> Tensor:
        return features[..., :-2].contiguous()


class Transposes(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.transpose(1, 2)


class Pointwise(nn.Conv1d):
    """Takes and returns `B T D`."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.mT).mT


class ChannelNorm(nn.LayerNorm):
    """Normalises `B C T` over its channels."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.mT).mT


def convolution(channels: int = C, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(C, channels, 3, **{"padding": 1, **options})


CHANNELS_FIRST: dict[str, Callable[[], nn.Module]] = {
    "convolution": convolution,
    "transposed convolution": lambda: nn.ConvTranspose1d(C, C, 3),
    "batch norm": lambda: nn.BatchNorm1d(C),
    "group norm": lambda: nn.GroupNorm(2, C),
    "pooling": lambda: nn.MaxPool1d(2),
    "chain": lambda: nn.Sequential(convolution(), nn.BatchNorm1d(C), nn.GELU(), nn.Dropout()),
    "gated": lambda: nn.Sequential(convolution(2 * C), nn.GLU(dim=1)),
    "norm of channels": lambda: nn.Sequential(convolution(), ChannelNorm(C)),
    "causal": lambda: Does(convolution(padding=0), lambda m, x: m(F.pad(x, (2, 0)))),
    "cut by a function": lambda: Does(convolution(padding=2), lambda m, x: m(x)[..., :-2]),
    "residual block of a temporal convolutional network": lambda: Does(
        nn.Sequential(weight_norm(convolution(padding=2)), Chomp(), nn.ReLU(), nn.Dropout()),
        lambda m, x: F.relu(x + m(x)),
    ),
}


@pytest.mark.parametrize("made", CHANNELS_FIRST)
def test_features_of_one_dimensional_convolutions_are_refused(made: str) -> None:
    model = nn.Sequential(CHANNELS_FIRST[made](), nn.Identity())
    with pytest.raises(ValueError, match=r"'0' returned .* channels in dimension 1 .*transposed"):
        esper.attach(model, "0", example=torch.randn(2, C, T))


TRANSPOSED_BACK: dict[str, Callable[[], nn.Module]] = {
    "in a function": lambda: Does(convolution(), lambda m, x: m(x.mT).mT),
    "in a function, residual": lambda: Does(convolution(), lambda m, x: x + m(x.mT).mT),
    "in modules": lambda: nn.Sequential(Transposes(), convolution(), nn.ReLU(), Transposes()),
    "in the convolution": lambda: Pointwise(C, C, 1),
    "with a linear layer behind": lambda: Does(
        nn.Sequential(convolution(), nn.Linear(C, C)), lambda m, x: m[1](m[0](x.mT).mT)
    ),
    "contiguous, with a norm behind": lambda: Does(
        nn.Sequential(convolution(), nn.LayerNorm(C)), lambda m, x: m[1](m[0](x.mT).mT.contiguous())
    ),
}


@pytest.mark.parametrize("tokens", [C, T])
@pytest.mark.parametrize("made", TRANSPOSED_BACK)
def test_features_that_are_transposed_back_are_tokens(made: str, tokens: int) -> None:
    model = nn.Sequential(nn.Linear(C, C), TRANSPOSED_BACK[made]())
    slot = esper.attach(model, "1", example=torch.randn(2, tokens, C))["1"]
    assert slot.layout.shape == (2, tokens, C)


def test_a_convolution_over_tokens_has_its_features_last_if_the_caller_says_so() -> None:
    model = nn.Sequential(nn.Conv1d(T, T, 1))
    slots = esper.attach(model, "0", example=torch.randn(2, T, C), family="transformer")
    assert slots["0"].dim == C
