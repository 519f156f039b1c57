"""Ctrl-C in a notebook, wherever it falls, and then `fit()` again."""

from typing import Any

import pytest
import torch

import esper
from esper.lifecycle.actions import Germinate
from esper.training.growth_driver import GrowthDriver
from growth_problem import Problem, make_problem


class Once:
    """Presses Ctrl-C the first time that it is armed."""

    armed = True

    def __call__(self, *_: Any) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


class Pausing(esper.PlannedPolicy):
    """Is interrupted at its first decision."""

    def __init__(self) -> None:
        super().__init__({})
        self.press = Once()

    def decide(self, state: Any) -> Any:
        self.press()
        return super().decide(state)


def interrupted(trainer: esper.Trainer) -> esper.Trainer:
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    return trainer


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
def test_the_first_step_afterwards_takes_its_own_gradient_alone(
    max_gradient_norm: float | None, precision: str
) -> None:
    def made(problem: Problem) -> esper.Trainer:
        settings: dict[str, Any] = {"max_gradient_norm": max_gradient_norm, "precision": precision}
        trainer = problem.trainer(esper.PlannedPolicy({}), 1, **settings)
        scaler = trainer.training_step.scaler
        if scaler.enabled:  # at the first scale gradients are not finite, and no step is made
            scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0})
        return trainer

    whole, problem = make_problem(), make_problem()
    made(whole).fit()
    trainer = made(problem)
    press = problem.optimizer.register_step_pre_hook(Once())
    interrupted(trainer)
    press.remove()
    trainer.fit()
    weights = zip(problem.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_an_epoch_that_is_trained_anew_has_its_own_losses() -> None:
    problem = make_problem()
    for group in problem.optimizer.param_groups:
        group["lr"] = 0.0
    problem.batches = [(x, y * number) for number, (x, y) in enumerate(problem.batches)]
    press = Once()
    press.armed = False

    def arm(*_: Any) -> None:
        press.armed = trainer.growth.step == 4 and trainer.epoch == 0

    trainer = problem.trainer(esper.PlannedPolicy({}), 2)
    problem.optimizer.register_step_post_hook(arm)
    problem.optimizer.register_step_pre_hook(press)
    first, second = interrupted(trainer).fit()
    assert first.train_loss == second.train_loss
    assert trainer.growth.train_losses == [first.train_loss] * 2


def test_what_was_looked_at_and_not_decided_ends_without_an_action(problem: Problem) -> None:
    trainer = interrupted(problem.trainer(Pausing(), 3))
    assert (trainer.growth.epoch, trainer.growth.awaits_decision) == (1, True)
    assert [report.epoch for report in trainer.fit()] == [1, 2, 3]
    assert trainer.growth.epoch == 4


def test_a_look_that_is_interrupted_between_two_steps_leaves_their_losses(problem: Problem) -> None:
    press, steps = Once(), problem.batches[:2]

    def evaluate() -> Any:
        press()
        return problem.held_out()

    problem.batches = steps
    policy = esper.PlannedPolicy({})
    trainer = problem.trainer(policy, 1, evaluate=evaluate, decision_interval_steps=2)
    interrupted(trainer)
    assert len(trainer.state_dict()["undecided"]["weighed"]) == 2


class Watching(esper.PlannedPolicy):
    """Germinates first, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__({1: [Germinate(slot="embed", blueprint="mlp")]})
        self.seen: list[tuple[int, int, int]] = []

    def decide(self, state: Any) -> Any:
        self.seen.append((state.epoch, len(state.losses), len(state.train_losses)))
        return super().decide(state)


@pytest.mark.parametrize("evaluation", [1, 5], ids=["while evaluated", "while a seed is weighed"])
def test_a_look_that_is_interrupted_is_none(evaluation: int, problem: Problem) -> None:
    def evaluate() -> Any:
        nonlocal evaluation
        evaluation -= 1
        if evaluation == 0:
            raise KeyboardInterrupt
        return problem.held_out()

    policy = Watching()
    interrupted(problem.trainer(policy, 4, evaluate=evaluate)).fit()
    assert policy.seen == [(epoch, epoch, epoch) for epoch in (1, 2, 3, 4)]


def test_a_frameworks_loop_takes_a_look_that_was_interrupted_again(problem: Problem) -> None:
    press, policy = Once(), Watching()

    def evaluate() -> Any:
        press()
        return problem.held_out()

    growth = esper.Growth(problem.slots, problem.optimizer, policy=policy)
    driver = GrowthDriver(
        growth, problem.model, evaluate=evaluate, decision_interval_steps=None, ema=None
    )
    problem.model(problem.batches[0][0]).sum().backward()
    problem.optimizer.step()
    driver.after_step()
    driver.note_loss(0.5)
    with pytest.raises(KeyboardInterrupt):
        driver.decide(epoch_ends=True)
    assert driver.decide(epoch_ends=True) is not None
    assert policy.seen == [(1, 1, 1)]
    assert driver.decide(epoch_ends=True) is None
