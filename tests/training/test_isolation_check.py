"""What growth does about a seed whose gradients reach the host."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.actions import Action, Advance, Germinate, GrowthState
from esper.lifecycle.events import (
    GateEvaluated,
    IsolationChecked,
    IsolationViolated,
    SeedPruned,
    StageChanged,
)
from esper.lifecycle.gates import Gate
from esper.lifecycle.stages import SeedStage
from esper.report import tell
from esper.seeds import Family, Seed, blueprints
from growth_problem import Problem, Recorder, make_problem


class LeakySeed(Seed):
    """An MLP that reads the host's features with their graph once `leaks` is on."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = blueprints.create(Family.TRANSFORMER, "mlp", dim)
        self.leaks = False
        self.captured: Tensor | None = None

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return self.inner.output_layers

    def capture(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.captured = output

    def increment(self, features: Tensor) -> Tensor:
        undetached = self.leaks and self.training
        return self.inner.increment(self.captured if undetached else features)


@pytest.fixture
def leaky_blueprint() -> Iterator[None]:
    with blueprints.temporarily() as registry:
        registry.register("leaky", family=Family.TRANSFORMER)(LeakySeed)
        yield


class Leaking(esper.PlannedPolicy):
    """Grows a leaky seed, and lets it leak from the moment it lives."""

    def __init__(self, problem: Problem, *, from_stage: SeedStage = SeedStage.TRAINING) -> None:
        super().__init__({1: [Germinate(slot="embed", blueprint="leaky")]}, patience_epochs=4)
        self._problem = problem
        self._from_stage = from_stage

    def decide(self, state: GrowthState) -> Sequence[Action]:
        slot = self._problem.slots["embed"]
        seed = slot.seed
        if isinstance(seed, LeakySeed) and not seed.leaks and slot.stage is self._from_stage:
            self._problem.model.embed.register_forward_hook(seed.capture, prepend=True)
            seed.leaks = True
        return super().decide(state)


def stages(recorder: Recorder) -> list[SeedStage]:
    return [event.to_stage for event in recorder.of(StageChanged)]


def test_seed_that_would_pass_g2_is_kept_out_of_the_forward_path_by_its_leak(
    leaky_blueprint: None,
) -> None:
    problem = make_problem()
    problem.trainer(Leaking(problem), epochs=16).fit()
    recorder = problem.recorder
    assert SeedStage.BLENDING not in stages(recorder)
    last = [e.result for e in recorder.of(GateEvaluated) if e.result.gate is Gate.G2][-1]
    assert [check.name for check in last.failures] == ["isolation_leaks"]
    assert len(recorder.of(SeedPruned)) == 1
    violated = recorder.of(IsolationViolated)
    assert violated[0].slot == "embed"
    assert violated[0].blueprint == "leaky"
    assert set(violated[0].reached) == {"embed.weight", "embed.bias"}
    assert violated[0].num_reached == 2
    (seed,) = tell(recorder.records).seeds
    assert seed.reason.startswith("G2 refused: isolation_leaks ")

    blind = make_problem()
    blind.trainer(Leaking(blind), epochs=16, isolation_check_steps=None).fit()
    assert SeedStage.BLENDING in stages(blind.recorder)
    assert not blind.recorder.of(IsolationChecked, IsolationViolated)


def test_seed_that_begins_to_leak_while_it_blends_does_not_get_past_g3(
    leaky_blueprint: None,
) -> None:
    problem = make_problem()
    policy = Leaking(problem, from_stage=SeedStage.BLENDING)
    problem.trainer(policy, epochs=20, isolation_check_steps=4).fit()
    assert SeedStage.BLENDING in stages(problem.recorder)
    assert SeedStage.SHADOWING not in stages(problem.recorder)
    last = [e.result for e in problem.recorder.of(GateEvaluated) if e.result.gate is Gate.G3][-1]
    assert "isolation_leaks" in {check.name for check in last.failures}


def test_own_loop_is_checked_by_one_line_and_refuses_too(leaky_blueprint: None) -> None:
    problem = make_problem()
    growth = esper.Growth(
        problem.slots,
        problem.optimizer,
        policy=Leaking(problem),
        max_epochs=16,
        sinks=[problem.recorder],
        clock=lambda: 0.0,
    )
    model = problem.model
    for _ in range(12):
        model.train()
        for x, y in problem.batches:
            growth.check_isolation(lambda x=x, y=y: mse_loss(model(x), y))
            mse_loss(model(x), y).backward()
            problem.optimizer.step()
            problem.optimizer.zero_grad()
            growth.after_step()
        growth.after_epoch(problem.held_out)
    assert problem.recorder.of(IsolationViolated)
    assert SeedStage.BLENDING not in stages(problem.recorder)


def test_an_action_between_two_epochs_knows_what_was_found_up_to_then(
    leaky_blueprint: None,
) -> None:
    problem = make_problem()
    trainer = problem.trainer(Leaking(problem), epochs=3)
    trainer.fit()
    growth, slot = trainer.growth, problem.slots["embed"]
    assert slot.stage is SeedStage.TRAINING
    slot.measurements.isolation_leaks = 0
    problem.model.train()
    features, targets = problem.batches[0]
    growth.isolation_monitor.interval_steps = 1
    growth.check_isolation(lambda: mse_loss(problem.model(features), targets))
    growth.apply(Advance(slot="embed"))
    judged = problem.recorder.of(GateEvaluated)[-1].result
    assert "isolation_leaks" in {check.name for check in judged.failures}


def test_clean_seed_is_checked_in_each_stage_and_committed() -> None:
    problem = make_problem()
    policy = esper.PlannedPolicy({3: [Germinate(slot="embed", blueprint="mlp")]})
    problem.trainer(policy, epochs=24, isolation_check_steps=10).fit()
    checked = problem.recorder.of(IsolationChecked)
    assert sum(event.checks for event in checked) > 6
    assert all(event.violations == event.without_verdict == 0 for event in checked)
    assert not problem.recorder.of(IsolationViolated)
    assert stages(problem.recorder)[-1] is SeedStage.FOSSILIZED


def test_only_the_last_batch_of_a_step_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    policy = esper.PlannedPolicy({1: [Germinate(slot="embed", blueprint="mlp")]})
    trainer = problem.trainer(policy, epochs=2, accumulation_steps=4, isolation_check_steps=1)
    seen: list[bool] = []
    weight = problem.model.embed.weight
    check = trainer.growth.check_isolation

    def watched(loss: Any) -> None:
        seen.append(weight.grad is not None)
        check(loss)

    monkeypatch.setattr(trainer.growth, "check_isolation", watched)
    trainer.fit()
    assert len(seen) == trainer.growth.step
    assert all(seen)
    assert sum(event.checks for event in problem.recorder.of(IsolationChecked)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "float16", "max_gradient_norm": 0.5},
        {"precision": "bfloat16", "accumulation_steps": 3},
        {"accumulation_steps": 4, "max_gradient_norm": 0.5},
    ],
)
def test_a_whole_run_is_bitwise_the_same_with_and_without(settings: dict[str, Any]) -> None:
    def weights(isolation_check_steps: int | None) -> tuple[dict[str, Tensor], list[SeedStage]]:
        problem = make_problem()
        policy = esper.PlannedPolicy({3: [Germinate(slot="embed", blueprint="mlp")]})
        problem.trainer(
            policy, epochs=16, isolation_check_steps=isolation_check_steps, **settings
        ).fit()
        violated = problem.recorder.of(IsolationViolated)
        checks = sum(event.checks for event in problem.recorder.of(IsolationChecked))
        assert not violated
        assert (checks > 10) == (isolation_check_steps == 1)
        return problem.model.state_dict(), stages(problem.recorder)

    (on, path), (off, path_off) = weights(1), weights(None)
    assert path == path_off
    assert on.keys() == off.keys()
    assert all(torch.equal(on[name], off[name]) for name in on)


def test_loss_that_is_not_finite_gives_no_verdict() -> None:
    problem = make_problem()
    policy = esper.PlannedPolicy({1: [Germinate(slot="embed", blueprint="mlp")]})
    features, targets = problem.batches[1]
    problem.batches[1] = (features, torch.full_like(targets, math.nan))
    problem.trainer(policy, epochs=2, isolation_check_steps=1).fit()
    (event,) = problem.recorder.of(IsolationChecked)
    assert event.without_verdict == 1
    assert event.violations == 0


def test_the_next_seed_is_not_charged_with_what_was_found_of_a_pruned_one(
    leaky_blueprint: None,
) -> None:
    problem = make_problem()
    trainer = problem.trainer(Leaking(problem), epochs=2)
    trainer.fit()
    growth, slot = trainer.growth, problem.slots["embed"]
    problem.model.train()
    features, targets = problem.batches[0]
    growth.isolation_monitor.interval_steps = 1
    growth.check_isolation(lambda: mse_loss(problem.model(features), targets))
    slot.prune()
    growth.after_epoch(problem.held_out)
    assert len(problem.recorder.of(IsolationViolated)) == 1
    assert slot.measurements.isolation_leaks is None
