"""The trainer makes the passes that a seed in shadow needs; a loop that forgets them is told."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import GradientHealthMeasured, IsolationChecked, StageChanged
from esper.lifecycle.learning import SeedObjective
from esper.lifecycle.stages import SeedStage
from growth_problem import TEST_CONFIG, Problem, make_problem

SHADOW = TEST_CONFIG.model_copy(update={"objective": SeedObjective.SHADOW})
PLAN = {1: [Germinate(slot="embed", blueprint="mlp")]}


def shadow_problem() -> Problem:
    return make_problem(config=SHADOW)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "float16", "max_gradient_norm": 0.5},
        {"precision": "bfloat16", "accumulation_steps": 3},
    ],
)
def test_the_host_trains_bitwise_as_alone_while_the_seed_learns_in_shadow(
    settings: dict[str, Any],
) -> None:
    def host_weights(plan: dict[int, list[Germinate]]) -> tuple[dict[str, Tensor], Problem]:
        problem = shadow_problem()
        policy = esper.PlannedPolicy(plan, tend_seeds=False)
        problem.trainer(policy, epochs=4, **settings).fit()
        state = problem.model.state_dict()
        return {n: t for n, t in state.items() if "esper_slot" not in n}, problem

    alone, _ = host_weights({})
    beside, problem = host_weights(PLAN)
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    slot = problem.slots["embed"]
    assert slot.stage is SeedStage.TRAINING
    steps_per_epoch = -(-len(problem.batches) // settings.get("accumulation_steps", 1))
    assert slot.measurements.training_steps == 3 * steps_per_epoch
    with torch.no_grad():
        assert float(slot.living(torch.ones(1, 16), torch.ones(1, 16)).abs().max()) > 1e-3


def test_the_seed_learns_from_a_loss_that_is_scaled_as_the_hosts_is() -> None:
    norms = []
    for precision in ("float32", "float16"):
        problem = shadow_problem()
        policy = esper.PlannedPolicy(PLAN, tend_seeds=False)
        settings = {"precision": precision, "max_gradient_norm": 100.0}
        problem.trainer(policy, epochs=2, **settings).fit()
        norms.append(problem.recorder.of(GradientHealthMeasured)[0].seed_norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.5)


def test_a_seed_that_learned_in_shadow_passes_its_gates_and_is_committed() -> None:
    problem = shadow_problem()
    problem.trainer(esper.PlannedPolicy(PLAN), epochs=24, isolation_check_steps=5).fit()
    stages = [event.to_stage for event in problem.recorder.of(StageChanged)]
    assert stages[-1] is SeedStage.FOSSILIZED
    checked = problem.recorder.of(IsolationChecked)
    assert checked
    assert all(event.violations == event.without_verdict == 0 for event in checked)
    assert problem.held_out()["loss"] < 0.5


def test_gradients_of_all_micro_batches_add_up_for_the_seed_as_for_the_host() -> None:
    steps = []
    for accumulation, size in ((1, 32), (4, 8)):
        problem = shadow_problem()
        inputs, targets = (torch.cat(part) for part in zip(*problem.batches, strict=True))
        problem.batches[:] = list(zip(inputs.split(size), targets.split(size), strict=True))
        policy = esper.PlannedPolicy(PLAN, tend_seeds=False)
        problem.trainer(policy, epochs=2, accumulation_steps=accumulation).fit()
        steps.append(problem.model.state_dict())
    assert any("esper_slot" in name for name in steps[0])
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_an_own_loop_that_makes_no_pass_is_told_how_to() -> None:
    problem = shadow_problem()
    growth = esper.Growth(problem.slots, problem.optimizer, policy=esper.PlannedPolicy(PLAN))
    growth.after_epoch(problem.held_out)

    def train(*, with_pass: bool) -> None:
        for x, y in problem.batches[:3]:
            if with_pass:
                growth.shadow_pass(lambda x=x, y=y: mse_loss(problem.model(x), y))
            mse_loss(problem.model(x), y).backward()
            problem.optimizer.step()
            problem.optimizer.zero_grad()
            growth.after_step()

    train(with_pass=True)
    assert problem.slots["embed"].measurements.training_steps == 3
    with pytest.raises(RuntimeError, match=r"'embed' .*call growth\.shadow_pass\("):
        train(with_pass=False)
