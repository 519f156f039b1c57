"""Losses of many steps are one tensor, and their mean is that of all of them to the bit."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import esper
from esper.training.step_losses import StepLosses
from growth_problem import make_problem

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_the_mean_is_that_of_all_losses_to_the_bit(count: int, dtype: torch.dtype) -> None:
    values = torch.rand(count).to(dtype)
    losses, resumed = StepLosses(), StepLosses()
    for number, value in enumerate(values):
        losses.add(value)
        if number == count // 3:
            resumed.load_state_dict(losses.state_dict(), device=CPU)
        elif number > count // 3:
            resumed.add(value)
    assert torch.equal(losses.state_dict()["weighed"], values)
    assert len(losses) == len(resumed) == count
    expected = float(values.to(torch.promote_types(dtype, torch.float32)).mean())
    assert losses.mean() == resumed.mean() == expected
    losses.clear()
    assert len(losses) == 0
    assert math.isnan(losses.mean())
    losses.add(torch.tensor(3.0))
    assert losses.mean() == 3.0


def test_losses_that_were_kept_do_not_change_with_those_that_come() -> None:
    losses = StepLosses()
    losses.add(torch.tensor(1.0))
    kept = losses.state_dict()
    losses.add(torch.tensor(2.0))
    other = StepLosses()
    other.load_state_dict(kept, device=CPU)
    other.add(torch.tensor(5.0))
    assert (kept["weighed"].tolist(), kept["num_batches"]) == ([1.0], 1)
    assert losses.mean() == 1.5


def test_a_step_counts_by_its_batches_before_a_state_was_taken_and_after() -> None:
    losses, resumed = StepLosses(), StepLosses()
    losses.add(torch.tensor(1.0), num_batches=4)
    resumed.load_state_dict(losses.state_dict(), device=CPU)
    for some in (losses, resumed):
        some.add(torch.tensor(11.0), num_batches=1)
        assert len(some) == 2
        assert some.mean() == 3.0


def test_losses_that_were_kept_go_where_the_next_one_is() -> None:
    """As where the model lies on several devices."""
    losses = StepLosses()
    losses.load_state_dict({"weighed": torch.ones(3), "num_batches": 3}, device=CPU)
    losses.add(torch.empty((), device="meta"))
    weighed = losses.state_dict()["weighed"]
    assert weighed.device.type == "meta"
    assert weighed.shape == (4,)


def test_keeping_a_run_late_in_an_epoch_takes_no_longer_than_early_in_it() -> None:
    trainer = make_problem().trainer(esper.PlannedPolicy({}), epochs=1)
    trainer.fit()
    for _ in range(20_000):
        trainer._losses.add(torch.tensor(1.0))
    with mock.patch.object(torch, "stack", wraps=torch.stack) as stack:
        losses = trainer.state_dict()["losses"]["weighed"]
    assert len(losses) == 20_000
    assert all(len(call.args[0]) < 256 for call in stack.call_args_list)


def test_a_short_last_group_counts_by_its_batches() -> None:
    problem, losses = make_problem(), []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = mse_loss(output, target) * 10.0 ** len(losses)  # the last one far from the others
        losses.append(float(value.detach()))
        return value

    problem.batches = problem.batches[:5]
    for group in problem.optimizer.param_groups:
        group["lr"] = 0.0
    trainer = problem.trainer(esper.PlannedPolicy({}), 1, loss=loss, accumulation_steps=4)
    (report,) = trainer.fit()
    assert report.step == 2
    assert report.train_loss == pytest.approx(sum(losses) / 5)
    assert trainer.growth.train_losses == [report.train_loss]
