"""Held-out evaluation leaves a host that trains on, and can be repeated."""

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import esper
from growth_problem import make_problem

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


def test_a_loader_that_draws_its_order_by_a_generator_has_the_same_order_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 5, 8), torch.zeros(64, dtype=torch.long))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    model, seen = Tabled(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    esper.HeldOut(model, loader, loss=sample_losses)()
    first = torch.cat(seen)
    seen.clear()
    esper.HeldOut(model, loader, loss=sample_losses)()
    assert torch.equal(torch.cat(seen), first)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize(
    "other",
    [copy.deepcopy, lambda _: make_problem().model, lambda model: model.head],
    ids=["copy", "made anew", "part"],
)
def test_held_out_of_another_model_than_grows_is_refused_before_anything_is_judged_by_it(
    other: Any,
) -> None:
    problem = make_problem()
    growth = esper.Growth(problem.slots, problem.optimizer)
    model = other(problem.model)
    held_out = esper.HeldOut(model, problem.held_out.batches, loss=problem.held_out.loss)
    with pytest.raises(
        ValueError,
        match=rf"HeldOut is of a {type(model).__name__} that does not contain slot 'embed'.*"
        r"give it growth\.slots\.model",
    ):
        growth.after_epoch(held_out)
    assert growth.losses == []
    growth.after_epoch(problem.held_out)
    assert growth.epoch == 1


def with_target_replaced(model: Any) -> nn.Module:
    """The slot is in nobody's model then, and it is for `germinate` to say so."""
    model.embed = nn.Linear(4, 16)
    return model


@pytest.mark.parametrize(
    "around",
    [nn.Sequential, lambda model: torch.compile(model, backend="eager"), with_target_replaced],
    ids=["whole", "compiled", "target replaced"],
)
def test_held_out_may_be_of_all_that_contains_what_growths_model_does(around: Any) -> None:
    problem = make_problem()
    growth = esper.Growth(problem.slots, problem.optimizer)
    model = around(problem.model)
    held_out = esper.HeldOut(model, problem.held_out.batches, loss=problem.held_out.loss)
    assert growth.after_epoch(held_out)["loss"] == pytest.approx(problem.held_out()["loss"])
