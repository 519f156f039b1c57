"""A training loop of one's own: growing by hand, and what a loop gets wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR

import esper
from esper.lifecycle.events import GateEvaluated, SeedGerminated, StageChanged
from growth_problem import Problem, Recorder, make_problem


@pytest.fixture
def problem() -> Problem:
    return make_problem()


def step(problem: Problem, optimizer: torch.optim.Optimizer | None = None) -> None:
    features, targets = problem.batches[0]
    mse_loss(problem.model(features), targets).backward()
    (optimizer or problem.optimizer).step()
    problem.model.zero_grad()


def test_without_a_policy_only_what_is_told_happens_and_gates_may_be_asked(
    problem: Problem,
) -> None:
    growth = esper.Growth(problem.slots, problem.optimizer, sinks=[problem.recorder])
    slot = problem.slots["embed"]
    slot.germinate("mlp")
    slot.advance(force=True)
    for _ in range(3):
        for _ in range(50):
            step(problem)
            growth.after_step()
        growth.after_epoch(problem.held_out)
    assert slot.stage is esper.SeedStage.TRAINING
    assert problem.recorder.of(SeedGerminated, StageChanged, GateEvaluated) == []
    (judged, *_) = slot.advance()  # by what growth has measured
    assert isinstance(judged, GateEvaluated)
    assert "missing" not in str(judged.result)
    assert slot.stage is esper.SeedStage.BLENDING, str(judged.result)


@pytest.mark.parametrize(
    ("policy", "got"),
    [
        ("heuristic", "got 'heuristic'"),
        (esper.HeuristicPolicy, "got the class HeuristicPolicy"),
        (lambda state: (), "got <function"),
    ],
)
def test_what_cannot_decide_is_no_policy_and_leaves_the_optimizer_alone(
    problem: Problem, policy: Any, got: str
) -> None:
    with pytest.raises(TypeError, match=rf"object with decide\(state\).*{got}"):
        esper.Growth(problem.slots, problem.optimizer, policy=policy)
    assert len(problem.optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=r"takes the slots .* got LinearHost"):
        esper.Growth(problem.model, problem.optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes the slots .* got LinearHost"):
        esper.save_pretrained(problem.model, "nowhere")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "value", "error", "told"),
    [
        ("sinks", Recorder(), TypeError, r"a list of sinks, got Recorder; pass sinks=\[…\]"),
        ("max_epochs", "3", TypeError, "a whole number of decisions, got '3'"),
        ("max_epochs", 2.5, TypeError, "a whole number of decisions, got 2.5"),
        ("max_epochs", -1, ValueError, "at least 0, got -1"),
        ("scheduler", "cosine", TypeError, "must be a learning-rate scheduler .* got 'cosine'"),
        ("scheduler", ExponentialLR, TypeError, "must be a learning-rate scheduler .* got <class"),
    ],
)
def test_an_argument_that_growth_could_not_use_is_refused_and_leaves_the_optimizer_alone(
    problem: Problem, argument: str, value: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        esper.Growth(problem.slots, problem.optimizer, **{argument: value})
    assert len(problem.optimizer.param_groups) == 1


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, with its groups, as accelerate's."""

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        self.param_groups = wrapped.param_groups


def test_a_scheduler_of_another_optimizer_is_refused_and_one_of_a_wrapped_one_is_not(
    problem: Problem,
) -> None:
    others = ExponentialLR(torch.optim.Adam(problem.model.parameters()), 0.9)
    told = "the ExponentialLR is of another optimizer than the Adam that trains"
    with pytest.raises(ValueError, match=told):
        esper.Growth(problem.slots, problem.optimizer, scheduler=others)
    scheduler = ExponentialLR(problem.optimizer, 0.9)
    with pytest.raises(ValueError, match=r"pass it .* esper\.Growth\(…, scheduler=…\)"):
        esper.Growth(problem.slots, problem.optimizer)
    scheduler.optimizer = Wrapper(problem.optimizer)
    growth = esper.Growth(problem.slots, problem.optimizer, scheduler=scheduler)
    made_of = {"loss": mse_loss, "evaluate": problem.held_out}
    config = esper.TrainerConfig(epochs=1)
    with pytest.raises(ValueError, match=told):
        esper.Trainer(growth, problem.batches, config=config, scheduler=others, **made_of)
    with pytest.raises(TypeError, match=r"takes the growth .* got LinearHost"):
        esper.Trainer(problem.model, problem.batches, config=config, **made_of)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 4), (torch.zeros(2, 4),), {"x": 1, "y": 2}, (1, 2, 3)]
)
def test_a_batch_that_is_no_pair_is_named(problem: Problem, batch: Any) -> None:
    held_out = esper.HeldOut(problem.model, [batch], loss=problem.held_out.loss)
    told = f"batches are pairs of inputs and targets, got a {type(batch).__name__}"
    with pytest.raises(TypeError, match=f"held-out {told}"):
        held_out()
    problem.batches = [batch]
    with pytest.raises(TypeError, match=f"training {told}"):
        problem.trainer(esper.PlannedPolicy({}), 1).fit()


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda outputs, targets: outputs - targets, r"a tensor of shape \(32,\); .* the mean"),
        (lambda outputs, targets: 0.5, "got 0.5"),
    ],
)
def test_a_loss_that_is_not_one_number_is_named(
    problem: Problem, loss: Callable[[Tensor, Tensor], Any], got: str
) -> None:
    with pytest.raises(TypeError, match=f"loss must be one number for a batch, .* {got}"):
        problem.trainer(esper.PlannedPolicy({}), 1, loss=loss).fit()


def test_a_step_that_growth_was_not_told_of_is_an_error_at_the_decision(problem: Problem) -> None:
    growth = esper.Growth(problem.slots, problem.optimizer)
    growth.after_epoch(problem.held_out)  # before the first step
    step(problem)
    growth.after_step()
    growth.after_epoch(problem.held_out)
    growth.after_step()  # in front of the step, where it is the one before that it tells of
    step(problem)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Adam has stepped, and growth.after_step\(\) was"):
            growth.after_epoch(problem.held_out)
    assert growth.epoch == 2
    growth.after_step()
    growth.after_epoch(problem.held_out)


def test_steps_that_growth_is_told_of_once_an_epoch_are_an_error_at_the_second_decision(
    problem: Problem,
) -> None:
    growth = esper.Growth(problem.slots, problem.optimizer)
    for _ in range(2):  # the first may be a loop that was broken off, and told properly afterwards
        for _ in range(9):
            step(problem)
        growth.after_step()
        growth.after_epoch(problem.held_out)
        step(problem)
        growth.after_step()
        growth.after_epoch(problem.held_out)
    for _ in range(9):
        step(problem)
    growth.after_step()
    growth.after_epoch(problem.held_out)
    for _ in range(9):
        step(problem)
    growth.after_step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"called once since .* Adam has made 9 steps"):
            growth.after_epoch(problem.held_out)
    assert growth.epoch == 5


@pytest.mark.parametrize(("told", "steps"), [(1, 8), (2, 9)])
def test_several_steps_on_a_batch_that_growth_is_told_of_together_are_no_error(
    problem: Problem, told: int, steps: int
) -> None:
    growth = esper.Growth(problem.slots, problem.optimizer)
    for _ in range(3):
        for _ in range(told):
            for _ in range(steps):
                step(problem)
            growth.after_step()
        growth.after_epoch(problem.held_out)
    assert growth.step == 3 * told


def test_another_optimizer_than_growth_was_given_is_an_error(problem: Problem) -> None:
    other = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    growth = esper.Growth(problem.slots, problem.optimizer)
    for _ in range(49):
        step(problem, other)
        growth.after_step()
    growth.after_epoch(problem.held_out)  # a loss scaler may skip as many
    step(problem, other)
    growth.after_step()
    with pytest.raises(RuntimeError, match=r"called 50 times, and the Adam .* has made no step"):
        growth.after_epoch(problem.held_out)
    step(problem)
    growth.after_step()
    growth.after_epoch(problem.held_out)
