"""Held-out evaluation leaves a host that trains on, and can be repeated."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper

INPUTS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(4, dtype=torch.long)


class Tabled(nn.Module):
    """Keeps the table of its longest forward so far, as hosts keep positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.table = torch.zeros(0)

    def forward(self, tokens: Tensor) -> Tensor:
        if len(self.table) < tokens.shape[1]:
            self.table = torch.linspace(0.0, 1.0, tokens.shape[1])
        features = torch.tanh(self.layer(tokens)) * self.table[: tokens.shape[1], None]
        return self.head(features.mean(1))


def sample_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="none")


@pytest.mark.parametrize("weigh", [False, True])
def test_a_host_trains_by_what_it_has_kept_of_an_evaluation(*, weigh: bool) -> None:
    model = Tabled()
    slots = esper.attach(model, "layer", example=INPUTS)
    longer = torch.cat([INPUTS, INPUTS], dim=1)
    held_out = esper.HeldOut(model, [(longer, LABELS)], loss=sample_losses)
    if weigh:
        held_out.variant_losses(slots, [{}])
    else:
        held_out()
    assert len(model.table) == 10
    model(INPUTS).sum().backward()
    assert model.layer.weight.grad is not None


@pytest.mark.parametrize(
    "once",
    [
        lambda batches: (batch for batch in batches),
        lambda batches: zip(*zip(*batches, strict=True), strict=True),
        lambda batches: islice(batches, 1),
    ],
    ids=["generator", "zip", "islice"],
)
def test_batches_that_can_be_evaluated_but_once_are_refused(once: Any) -> None:
    batches = once([(INPUTS, LABELS)])
    with pytest.raises(
        TypeError, match=f"a {type(batches).__name__} is empty after the first; give a list"
    ):
        esper.HeldOut(Tabled(), batches, loss=sample_losses)


def test_no_batches_are_named_where_seeds_are_weighed_too() -> None:
    model = Tabled()
    slots = esper.attach(model, "layer", example=INPUTS)
    held_out = esper.HeldOut(model, [], loss=sample_losses)
    with pytest.raises(ValueError, match="held-out data has no batches"):
        held_out.variant_losses(slots, [{}])
