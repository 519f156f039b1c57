"""Slots take features with the batch first; where it can be told that they are not, attach says so.

Legend: B batch, T tokens, D features.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper

WIDTH = 8


class TokensFirst(nn.Module):
    """Takes `B T D` and works on `T B D`, as hosts around old attention layers do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.layer = layer
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor, **masks: Tensor) -> Tensor:
        hidden = self.layer(self.stem(tokens).transpose(0, 1))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden.transpose(0, 1))


class Flattens(nn.Module):
    """Works on rows of all samples, some of whose counts are equal by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, WIDTH)
        self.calls: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.append(len(tokens))
        return self.layer(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


class AttendsToSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens)[0]


@pytest.mark.parametrize(("batch", "tokens"), [(4, 5), (4, 4), (1, 5), (1, 1), (8, 5), (2, 8)])
@pytest.mark.parametrize(
    "example", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: {"tokens": x}]
)
def test_features_with_the_batch_further_back_are_refused(
    batch: int, tokens: int, example: Any, fingerprint: Any
) -> None:
    model, inputs = TokensFirst(nn.Linear(WIDTH, WIDTH)), torch.randn(batch, tokens, 3)
    before = fingerprint(model)
    with pytest.raises(
        ValueError,
        match=rf"'layer' returned features of shape \({tokens}, {batch}, 8\), where the batch is "
        r"dimension 1; .* batch first .*batch_first=True",
    ):
        esper.attach(model, "layer", example=example(inputs))
    assert fingerprint(model) == before
    esper.attach(model, ["stem", "head"], example=inputs)


def encoder(*, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=batch_first)
    norm = nn.LayerNorm(WIDTH)
    return nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (nn.LSTM(WIDTH, WIDTH), "0"),
        (nn.GRU(WIDTH, WIDTH), "0"),
        (AttendsToSelf(), "0.attention"),
        (nn.TransformerEncoderLayer(WIDTH, 2, 16), "0"),
        (nn.TransformerEncoderLayer(WIDTH, 2, 16, norm_first=True), "0.linear2"),
        (encoder(batch_first=False), "0"),
        (encoder(batch_first=False), "0.norm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_torchs_layers_that_take_tokens_first_are_refused_whatever_the_example(
    layer: nn.Module, target: str
) -> None:
    with pytest.raises(ValueError, match=rf"'{target}' .*dimension 1; .*batch_first=True"):
        esper.attach(nn.Sequential(layer), target, example=torch.randn(5, 4, WIDTH))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(WIDTH, WIDTH, batch_first=True),
        nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True),
        encoder(batch_first=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_torchs_layers_that_take_the_batch_first_are_accepted(layer: nn.Module, batch: int) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    esper.attach(model, "0", example=torch.randn(batch, 5, WIDTH))


@pytest.mark.parametrize(("batch", "calls"), [(4, [4, 4, 4]), (8, [8, 8, 16, 8])])
def test_rows_of_all_samples_are_accepted_and_looked_at_again_only_where_that_tells(
    batch: int, calls: list[int]
) -> None:
    model = Flattens()
    esper.attach(model, "layer", example=torch.randn(batch, 5, 3))
    assert model.calls == calls


def test_a_host_that_takes_one_batch_size_only_is_accepted_where_nothing_can_be_told() -> None:
    class TakesFour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, WIDTH)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(tokens.reshape(4, 4, 3))

    esper.attach(TakesFour(), "layer", example=torch.randn(4, 4, 3))
