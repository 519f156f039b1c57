"""With float16 the loss scaler skips steps of its own: told, and never counted as good ones."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.events import Priority, RunWentBack, StepSkipped
from esper.training.safeguard import TrainingDivergedError
from growth_problem import Problem

FIRST_SCALE = 2.0**16
SETTINGS: dict[str, Any] = {"precision": "float16", "governor": {"snapshot_steps": 4}}


def make_trainer(problem: Problem, *, epochs: int, fused: bool, **settings: Any) -> esper.Trainer:
    problem.optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2, fused=fused)
    return problem.trainer(esper.PlannedPolicy({}), epochs, **SETTINGS, **settings)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
def test_gradients_that_are_never_finite_are_told_at_each_step_and_end_the_run(
    fused: bool, max_gradient_norm: float | None, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(problem, epochs=2, fused=fused, max_gradient_norm=max_gradient_norm)
    trainer.ema = esper.EMA(problem.slots, decay=0.5)
    monkeypatch.setattr(trainer.ema, "update", lambda: pytest.fail("nothing was learned"))
    before = [parameter.clone() for parameter in problem.model.parameters()]
    problem.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    reports = trainer.run()
    first = next(reports)
    with pytest.raises(
        TrainingDivergedError, match=r"no step of epoch 2 .*is not finite at loss scale"
    ):
        next(reports)
    told = problem.recorder.of(StepSkipped)
    assert [event.loss_scale for event in told] == [FIRST_SCALE / 2**k for k in range(32)]
    assert [event.priority for event in told] == [Priority.NORMAL] * 17 + [Priority.CRITICAL] * 15
    assert "not finite at loss scale 65536" in told[0].reason
    assert math.isnan(first.train_loss)
    assert all(map(torch.equal, problem.model.parameters(), before))
    assert trainer._safeguard._good is None, "no step has shown that a state is good"


@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_in_which_nothing_has_a_gradient_are_none_of_the_scalers(
    fused: bool, max_gradient_norm: float | None, problem: Problem
) -> None:
    """The host is frozen, and so is the only seed; one batch is refused besides."""
    problem.model.requires_grad_(requires_grad=False)
    features, targets = problem.batches[7]
    problem.batches[7] = (features, torch.full_like(targets, math.nan))
    trainer = make_trainer(problem, epochs=1, fused=fused, max_gradient_norm=max_gradient_norm)
    slot = problem.slots["embed"]
    slot.germinate("mlp")
    while slot.stage is not esper.SeedStage.SHADOWING:
        slot.advance(force=True)
    trainer.fit()
    assert [event.loss_scale for event in problem.recorder.of(StepSkipped)] == [None]
    assert trainer.training_step.scaler.state_dict()["scale"] == FIRST_SCALE


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_measured(fused: bool, problem: Problem) -> None:
    slot = problem.slots["embed"]
    problem.optimizer = torch.optim.Adam(problem.model.parameters(), fused=fused)
    problem.slots.bind(problem.optimizer)
    slot.germinate("mlp")
    slot.advance(force=True)
    scaler = torch.amp.GradScaler("cpu")
    features, targets = problem.batches[0]

    def step(factor: float) -> None:
        scaler.scale(mse_loss(problem.model(features), targets) * factor).backward()
        scaler.step(problem.optimizer)
        scaler.update()
        problem.optimizer.zero_grad()
        problem.slots.tick()

    step(math.inf)
    assert problem.slots.read_gradient_health(slot) is None
    step(1.0)
    reading = problem.slots.read_gradient_health(slot)
    assert reading is not None
    assert math.isfinite(reading.host_norm)


def test_a_scale_that_is_lowered_below_1_leads_back(problem: Problem) -> None:
    trainer = make_trainer(problem, epochs=4, fused=False, max_gradient_norm=None)
    steps = itertools.count(1)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * (math.inf if next(steps) > 20 else 1.0)

    problem.model.head.weight.register_hook(spoil)
    with pytest.raises(TrainingDivergedError, match="again, 2 times after going back"):
        trainer.fit()
    backs = problem.recorder.of(RunWentBack)
    assert [back.same_batches for back in backs] == [True, False]
    below_one = [e for e in problem.recorder.of(StepSkipped) if e.priority is Priority.CRITICAL]
    assert len(below_one) == 3 * len([*backs, "the error"]), "three in a row each time"


@pytest.mark.parametrize("fused", [False, True])
def test_a_seed_has_not_learned_in_a_step_that_the_scaler_skips(
    fused: bool, problem: Problem
) -> None:
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2, fused=fused)
    problem.slots.bind(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    features, targets = problem.batches[0]

    def has_learned(factor: float) -> bool:
        scaler.scale(mse_loss(problem.model(features), targets) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert problem.slots.binding is not None
        return problem.slots.binding.take_step()

    assert [has_learned(factor) for factor in (1.0, math.inf, 1.0)] == [True, False, True]


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
