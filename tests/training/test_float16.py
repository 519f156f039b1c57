"""With float16 the loss scaler skips steps of its own: told, and never counted as good ones."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import esper
from esper.lifecycle.events import Priority, StepSkipped
from growth_problem import Problem

FIRST_SCALE = 2.0**16
SETTINGS: dict[str, Any] = {"precision": "float16", "governor": {"snapshot_steps": 4}}


def make_trainer(problem: Problem, *, epochs: int, fused: bool, **settings: Any) -> esper.Trainer:
    problem.optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2, fused=fused)
    return problem.trainer(esper.SchedulePolicy({}), epochs, **SETTINGS, **settings)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
def test_gradients_that_are_never_finite_are_told_at_each_step(
    fused: bool, max_gradient_norm: float | None, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(problem, epochs=2, fused=fused, max_gradient_norm=max_gradient_norm)
    trainer.ema = esper.EMA(problem.slots, decay=0.5)
    monkeypatch.setattr(trainer.ema, "update", lambda: pytest.fail("nothing was learned"))
    before = [parameter.clone() for parameter in problem.model.parameters()]
    problem.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    first, second = trainer.fit()
    told = problem.recorder.of(StepSkipped)
    assert [event.loss_scale for event in told] == [FIRST_SCALE / 2**k for k in range(32)]
    assert [event.priority for event in told] == [Priority.NORMAL] * 17 + [Priority.CRITICAL] * 15
    assert "not finite at loss scale 65536" in told[0].reason
    assert math.isnan(first.train_loss)
    assert math.isnan(second.train_loss)
    assert all(map(torch.equal, problem.model.parameters(), before))
    assert trainer._safeguard._good is None, "no step has shown that a state is good"


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_told_and_training_goes_on(
    fused: bool, problem: Problem
) -> None:
    trainer = make_trainer(problem, epochs=2, fused=fused)
    steps = itertools.count(1)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * (math.inf if next(steps) == 20 else 1.0)

    problem.model.head.weight.register_hook(spoil)
    first, second = trainer.fit()
    records = [r for r in problem.recorder.records if isinstance(r.event, StepSkipped)]
    *searching, spoilt = records
    assert spoilt.step == 19, "as told before the step is counted"
    assert spoilt.event.loss_scale == FIRST_SCALE / 2 ** len(searching)
    assert spoilt.event.priority is Priority.NORMAL
    assert second.train_loss < first.train_loss
    assert trainer._safeguard._good is not None
    assert trainer.growth.step == 32


@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
def test_a_step_that_the_governor_refuses_is_none_of_the_scalers(
    max_gradient_norm: float | None, problem: Problem
) -> None:
    features, targets = problem.batches[7]
    problem.batches[7] = (features, torch.full_like(targets, math.nan))
    trainer = make_trainer(problem, epochs=1, fused=False, max_gradient_norm=max_gradient_norm)
    (report,) = trainer.fit()
    told = {record.step: record.event for record in problem.recorder.records}[7]
    assert told.reason == "the loss is not finite"
    assert told.loss_scale is None
    assert told.priority is Priority.CRITICAL
    assert math.isfinite(report.train_loss)
