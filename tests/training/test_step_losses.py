"""Losses of many steps are one tensor, and their mean is that of all of them to the bit."""

import math
from unittest import mock

import pytest
import torch

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
            resumed.load(losses.tensor(), device=CPU)
        elif number > count // 3:
            resumed.add(value)
    assert torch.equal(losses.tensor(), values)
    assert len(losses) == len(resumed) == count
    expected = float(torch.stack(list(values)).mean())
    assert losses.take_mean() == resumed.take_mean() == expected
    assert len(losses) == 0
    assert math.isnan(losses.take_mean())
    losses.add(torch.tensor(3.0))
    assert losses.take_mean() == 3.0


def test_losses_that_were_kept_do_not_change_with_those_that_come() -> None:
    losses = StepLosses()
    losses.add(torch.tensor(1.0))
    kept = losses.tensor()
    losses.add(torch.tensor(2.0))
    other = StepLosses()
    other.load(kept, device=CPU)
    other.add(torch.tensor(5.0))
    assert kept.tolist() == [1.0]
    assert losses.take_mean() == 1.5


def test_losses_that_were_kept_go_where_the_next_one_is() -> None:
    """As where the model lies on several devices."""
    losses = StepLosses()
    losses.load(torch.ones(3), device=CPU)
    losses.add(torch.empty((), device="meta"))
    assert losses.tensor().device.type == "meta"
    assert losses.tensor().shape == (4,)


def test_keeping_a_run_late_in_an_epoch_takes_no_longer_than_early_in_it() -> None:
    trainer = make_problem().trainer(esper.SchedulePolicy({}), epochs=1)
    trainer.fit()
    for _ in range(20_000):
        trainer._losses.add(torch.tensor(1.0))
    with mock.patch.object(torch, "stack", wraps=torch.stack) as stack:
        losses = trainer.state_dict()["losses"]
    assert len(losses) == 20_000
    assert all(len(call.args[0]) < 256 for call in stack.call_args_list)
