"""The growth engine and the trainer, on a problem where capacity is missing by construction."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.lifecycle.actions import Action, Advance, Germinate, GrowthState, Prune, SetAlphaTarget
from esper.lifecycle.events import (
    ActionRefused,
    AmplitudeSearched,
    BreakerChanged,
    ContributionMeasured,
    GateEvaluated,
    GerminationFailed,
    RunStarted,
    SeedCommitted,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    SeedRescaled,
    StageChanged,
    StepSkipped,
)
from esper.lifecycle.gates import Gate, GateThresholds
from esper.lifecycle.learning import Isolation
from esper.lifecycle.stages import GROWTH_PATH, SeedStage
from esper.policies import GrowthSchedulePolicy, RandomPolicy, UCB1Chooser, ucb1_policy
from esper.seeds import Family, Seed, blueprints
from esper.slots.modes import evaluation_mode
from esper.training import Checkpoints
from esper.training.held_out import metrics_of
from esper.training.safeguard import TrainingDivergedError
from growth_problem import LENIENT, TEST_CONFIG, Problem, Recorder, make_problem


class Script:
    """A policy that returns given actions at given epochs."""

    name = "script"

    def __init__(self, actions: dict[int, list[Action]]) -> None:
        self._actions = actions

    def decide(self, state: GrowthState) -> Sequence[Action]:
        return self._actions.get(state.epoch, [])


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def grow_mlp(epoch: int = 3) -> esper.PlannedPolicy:
    return esper.PlannedPolicy({epoch: [Germinate(slot="embed", blueprint="mlp")]})


def own_loop(problem: Problem, policy: esper.Policy, epochs: int) -> None:
    growth = esper.Growth(
        problem.slots,
        problem.optimizer,
        policy=policy,
        max_epochs=epochs,
        sinks=[problem.recorder],
        clock=lambda: 0.0,
    )
    for _ in range(epochs):
        problem.model.train()
        for features, targets in problem.batches:
            growth.check_isolation(lambda x=features, y=targets: mse_loss(problem.model(x), y))
            mse_loss(problem.model(features), targets).backward()
            problem.optimizer.step()
            problem.optimizer.zero_grad()
            growth.after_step()
        growth.after_epoch(problem.held_out)


def comparable(recorder: Recorder) -> list[str]:
    """Events without the one measurement that depends on the wall clock."""
    kept = []
    for record in recorder.records:
        document = record.model_dump(mode="json")
        document["event"].pop("prewarm_ms", None)
        kept.append(str(document))
    return kept


def test_missing_capacity_is_grown_and_committed(problem: Problem) -> None:
    problem.trainer(grow_mlp(), epochs=24).fit()
    recorder = problem.recorder
    stages = [event.to_stage for event in recorder.of(StageChanged)]
    assert stages == list(GROWTH_PATH[1:])
    assert len(recorder.of(SeedCommitted)) == 1
    gates = {event.result.gate for event in recorder.of(GateEvaluated) if event.result.passed}
    assert gates == set(Gate)

    alone = make_problem()
    alone.trainer(Script({}), epochs=24).fit()
    assert problem.held_out()["loss"] < 0.5 * alone.held_out()["loss"]


def test_growth_with_a_plain_evaluation_function_takes_the_same_path(problem: Problem) -> None:
    held_out = problem.held_out

    def evaluate() -> float:
        problem.model.eval()
        loss = held_out()["loss"]
        problem.model.train()
        return loss

    problem.trainer(grow_mlp(), epochs=24, evaluate=evaluate).fit()
    assert len(problem.recorder.of(SeedCommitted)) == 1
    measured = problem.recorder.of(ContributionMeasured)
    assert measured
    assert all(event.standard_error_fraction is None for event in measured)


@pytest.mark.parametrize("blueprint", ["noop", "norm"])
def test_useless_seed_is_refused_for_a_stated_reason_and_pruned(blueprint: str) -> None:
    problem = make_problem()
    policy = esper.PlannedPolicy(
        {3: [Germinate(slot="embed", blueprint=blueprint)]}, patience_epochs=4
    )
    problem.trainer(policy, epochs=16).fit()
    assert not problem.recorder.of(SeedCommitted)
    (pruned,) = problem.recorder.of(SeedPruned)
    assert "refused for" in pruned.reason
    refusal = [e.result for e in problem.recorder.of(GateEvaluated) if not e.result.passed][-1]
    assert refusal.failures
    assert problem.slots["embed"].stage in (SeedStage.DORMANT, SeedStage.EMBARGOED)


def test_own_loop_and_trainer_give_the_same_events_and_weights_bitwise() -> None:
    first, second = make_problem(), make_problem()
    first.trainer(grow_mlp(), epochs=20).fit()
    own_loop(second, grow_mlp(), epochs=20)
    assert comparable(first.recorder) == comparable(second.recorder)
    mine, other = first.model.state_dict(), second.model.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_every_sink_is_told_once_that_the_run_begins_and_before_anything_else() -> None:
    problem, late = make_problem(), Recorder()
    size = num_params(problem.model)
    growth = problem.trainer(grow_mlp(), epochs=1).growth
    growth.publish(problem.slots["embed"].germinate("mlp"))
    problem.slots["embed"].advance(force=True)
    growth.after_step()
    growth.sinks.append(late)
    growth.after_step()
    growth.after_epoch(problem.held_out)
    begun = RunStarted(slots=("embed",), host_param_count=size)
    for recorder, step in ((problem.recorder, 0), (late, 1)):
        assert recorder.of(RunStarted) == [begun]
        assert (recorder.records[0].event, recorder.records[0].step) == (begun, step)
        assert recorder.records[0].epoch == 0


def test_a_network_that_has_grown_before_is_told_with_what_it_has_committed() -> None:
    grown, fresh = make_problem(), make_problem()
    growth = grown.trainer(esper.PlannedPolicy({}), epochs=1).growth
    grown.slots["embed"].germinate("mlp")
    while grown.slots["embed"].stage is not SeedStage.FOSSILIZED:
        grown.slots["embed"].advance(force=True)
    going_on = fresh.trainer(esper.PlannedPolicy({}), epochs=1).growth
    going_on.load_state_dict(growth.state_dict())
    going_on.publish(fresh.slots["embed"].germinate("mlp"))
    assert num_params(fresh.model) > num_params(grown.model) > num_params(make_problem().model)
    (begun,) = fresh.recorder.of(RunStarted)
    assert begun.host_param_count == num_params(grown.model)


def test_a_seed_that_was_grown_by_hand_and_is_told_of_at_once_is_no_part_of_the_host() -> None:
    problem, late = make_problem(), Recorder()
    size = num_params(problem.model)
    growth = problem.trainer(esper.PlannedPolicy({}), epochs=1).growth
    slot = problem.slots["embed"]
    events = list(slot.germinate("mlp"))
    while slot.living is not None:
        events += slot.advance(force=True)
    growth.publish(events)
    growth.sinks.append(late)
    growth.after_step()
    (begun,) = problem.recorder.of(RunStarted)
    assert begun.host_param_count == size
    (begun,) = late.of(RunStarted)
    assert begun.host_param_count == num_params(problem.model), "it is not told of the seed"


def test_a_loop_of_ones_own_tells_its_start_with_its_first_step() -> None:
    problem = make_problem()
    growth = esper.Growth(problem.slots, problem.optimizer, sinks=[problem.recorder])
    mse_loss(problem.model(problem.batches[0][0]), problem.batches[0][1]).backward()
    problem.optimizer.step()
    growth.after_step()
    assert [record.event.type for record in problem.recorder.records] == ["run_started"]
    assert problem.recorder.records[0].step == 0


def test_fit_warns_of_seeds_that_still_live_and_where_nothing_is_left_to_train(
    problem: Problem,
) -> None:
    trainer = problem.trainer(grow_mlp(1), epochs=3)
    told = r"ended with living seeds: 'mlp' in 'embed' \(TRAINING\)"
    with pytest.warns(UserWarning, match=told) as warned:
        assert len(trainer.fit()) == 3
    with pytest.warns(UserWarning, match="all 3 epochs are trained, .* Trainer with more") as again:
        assert trainer.fit() == []
    assert [warning.filename for warning in (*warned, *again)] == [__file__] * 2
    problem.slots.unbind()
    longer = problem.trainer(grow_mlp(1), epochs=4)
    longer.load_state_dict(trainer.state_dict())
    assert [report.epoch for report in longer.run()] == [4], "the trainer's own loop warns of none"


def test_run_is_deterministic_under_a_seed() -> None:
    runs = []
    for _ in range(2):
        problem = make_problem(seed=3)
        problem.trainer(esper.RandomPolicy(5), epochs=20).fit()
        runs.append(problem)
    assert comparable(runs[0].recorder) == comparable(runs[1].recorder)
    assert len(runs[0].recorder.of(SeedGerminated)) > 0
    other = make_problem(seed=3)
    other.trainer(esper.RandomPolicy(6), epochs=20).fit()
    assert comparable(runs[0].recorder) != comparable(other.recorder)


def test_random_policy_survives_a_long_run_in_which_everything_happens() -> None:
    problem = make_problem()
    problem.trainer(esper.RandomPolicy(1), epochs=80).fit()
    assert not problem.recorder.of(ActionRefused)
    assert problem.recorder.of(SeedPruned)


def test_live_insertion_walks_to_full_alpha_in_one_decision_and_changes_nothing() -> None:
    config = TEST_CONFIG.model_copy(update={"isolation": Isolation.NONE})
    problem = make_problem(config=config)
    features = problem.batches[0][0]
    outputs: list[Tensor] = []

    class Peek(Script):
        def decide(self, state: GrowthState) -> Sequence[Action]:
            with torch.no_grad():
                outputs.append(problem.model.eval()(features))
            return super().decide(state)

    germinate = Germinate(slot="embed", blueprint="mlp")
    trainer = problem.trainer(Peek({1: [germinate]}), epochs=1)
    trainer.fit()
    slot = problem.slots["embed"]
    assert slot.stage is SeedStage.BLENDING
    assert slot.alpha == 1.0
    with torch.no_grad():
        assert torch.equal(problem.model.eval()(features), outputs[0])


def test_live_seed_is_committed_where_capacity_is_missing() -> None:
    config = TEST_CONFIG.model_copy(update={"isolation": Isolation.NONE})
    problem = make_problem(config=config)
    problem.trainer(grow_mlp(), epochs=16).fit()
    assert len(problem.recorder.of(SeedCommitted)) == 1


@pytest.mark.parametrize("losses_before", [[], [math.nan, math.inf]])
def test_a_live_seed_with_no_loss_before_it_is_judged_by_the_first_one_that_is_finite(
    losses_before: list[float],
) -> None:
    limits = GateThresholds(**LENIENT | {"max_loss_increase_fraction": 0.1}, min_steps_at_target=0)
    config = TEST_CONFIG.model_copy(update={"isolation": Isolation.NONE, "thresholds": limits})
    problem = make_problem(config=config)
    growth = esper.Growth(
        problem.slots, problem.optimizer, policy=Script({}), sinks=[problem.recorder]
    )
    slot = problem.slots["embed"]

    def increase_at_g3(loss: float) -> float | None:
        growth.look(lambda: loss)
        growth.apply(Advance(slot="embed"))
        growth.conclude([])
        result = problem.recorder.of(GateEvaluated)[-1].result
        assert result.gate is Gate.G3
        (check,) = [check for check in result.checks if check.name == "loss_increase_fraction"]
        assert result.passed == check.passed == (slot.stage is SeedStage.SHADOWING)
        return check.measured

    for loss in losses_before:
        growth.after_epoch(lambda value=loss: value)
    growth.apply(Germinate(slot="embed", blueprint="mlp"))
    assert slot.alpha == 1.0
    assert increase_at_g3(math.nan) is None
    assert increase_at_g3(2.0) is None, "a loss is not compared with itself"
    assert increase_at_g3(2.5) == pytest.approx(0.25)
    assert slot.stage is SeedStage.BLENDING
    assert increase_at_g3(2.1) == pytest.approx(0.05)
    assert slot.stage is SeedStage.SHADOWING


@pytest.mark.parametrize("isolation", ["none", "shadowing"])
def test_a_seed_that_begins_to_blend_where_the_loss_is_not_finite_has_the_hosts_last_one(
    isolation: str,
) -> None:
    problem = make_problem(config=esper.SlotConfig(isolation=isolation))
    growth = esper.Growth(problem.slots, problem.optimizer, policy=Script({}))
    slot = problem.slots["embed"]
    germinate = Germinate(slot="embed", blueprint="mlp")
    if isolation == "shadowing":
        growth.apply(germinate)
    for loss in (2.0, math.nan):
        growth.after_epoch(lambda value=loss: value)
    if isolation == "none":
        growth.apply(germinate)
    else:
        slot.advance(force=True)
    growth.after_epoch(lambda: 3.0)
    assert slot.stage is SeedStage.BLENDING
    assert slot.measurements.loss_increase_fraction == 0.5


def test_a_loss_that_was_0_has_risen_without_measure_or_not_at_all() -> None:
    problem = make_problem()
    growth = esper.Growth(problem.slots, problem.optimizer, policy=Script({}))
    slot = problem.slots["embed"]
    growth.apply(Germinate(slot="embed", blueprint="mlp"))
    growth.after_epoch(lambda: 0.0)
    slot.advance(force=True)
    for loss, increase in ((0.0, 0.0), (1e-3, math.inf)):
        growth.after_epoch(lambda value=loss: value)
        assert slot.measurements.loss_increase_fraction == increase


def test_amplitude_search_rescales_the_seed_so_that_alpha_one_is_best(problem: Problem) -> None:
    problem.trainer(grow_mlp(), epochs=8).fit()
    (rescaled,) = problem.recorder.of(SeedRescaled)
    search = problem.recorder.of(AmplitudeSearched)[-1]
    assert rescaled.factor == search.best_amplitude != 1.0
    best = min(search.losses)
    assert search.losses[search.amplitudes.index(rescaled.factor)] == best


@pytest.mark.parametrize(("operator", "factor"), [("add", 0.05), ("add", 20.0), ("multiply", 0.05)])
def test_what_g2_judges_is_what_blending_begins_with(operator: str, factor: float) -> None:
    """Also of a seed that is not linear in the layers that are scaled, or much too large."""
    problem = make_problem()
    slot = problem.slots["embed"]
    growth = esper.Growth(
        problem.slots,
        problem.optimizer,
        policy=esper.PlannedPolicy({}, tend_seeds=False),
        sinks=[problem.recorder],
    )
    slot.germinate("mlp", blend_operator=operator)
    slot.advance(force=True)
    for features, targets in problem.batches * 4:
        mse_loss(problem.model(features), targets).backward()
        problem.optimizer.step()
        problem.optimizer.zero_grad()
        growth.after_step()
    assert slot.living is not None
    with torch.no_grad():
        for layer in slot.living.seed.output_layers:
            for parameter in layer.parameters():
                parameter.mul_(factor)
    before = [parameter.clone() for parameter in slot.living.parameters()]
    growth.after_epoch(problem.held_out)
    (search,) = problem.recorder.of(AmplitudeSearched)
    assert search.best_amplitude != 1.0
    assert all(map(torch.equal, before, slot.living.parameters())), "measuring changes nothing"
    slot.advance(force=True)
    with evaluation_mode(problem.model), slot.force_alpha(1.0):
        begun_with = problem.held_out()["loss"]
    assert search.rescaled_loss == pytest.approx(begun_with, rel=1e-5)


def test_action_that_is_not_legal_has_no_effect_and_is_told() -> None:
    problem = make_problem()
    unknown = Germinate(slot="embed", blueprint="mpl")
    actions: list[Action] = [
        Advance(slot="embed"),
        unknown,
        Prune(slot="nowhere"),
        SetAlphaTarget(slot="embed", target=0.5, steps=3),
    ]
    problem.trainer(Script({1: actions}), epochs=1).fit()
    refused = problem.recorder.of(ActionRefused)
    assert [event.action for event in refused] == actions
    assert "mlp" in refused[1].reason
    assert problem.slots["embed"].stage is SeedStage.DORMANT


def test_blueprint_that_cannot_be_built_trips_its_breaker_and_training_goes_on() -> None:
    with blueprints.temporarily() as registry:

        @registry.register("broken", family=Family.TRANSFORMER)
        def _broken(dim: int) -> Seed:
            if torch.empty(0).device.type == "meta":  # fits, as far as one can tell beforehand
                return registry.create(Family.TRANSFORMER, "norm", dim)
            raise RuntimeError("no seed today")

        problem = make_problem()
        policy = Script({e: [Germinate(slot="embed", blueprint="broken")] for e in range(1, 6)})
        reports = problem.trainer(policy, epochs=6).fit()
    failed = problem.recorder.of(GerminationFailed)
    assert len(failed) == 5
    assert "no seed today" in failed[0].error
    assert "tried again" in failed[3].error
    assert [event.to_state for event in problem.recorder.of(BreakerChanged)] == ["open"]
    assert len(reports) == 6
    assert problem.slots["embed"].stage is SeedStage.DORMANT


def test_seed_whose_forward_raises_is_pruned_and_training_goes_on() -> None:
    calls = 0

    class Failing(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            nonlocal calls
            calls += features.device.type != "meta"
            if calls > 40:
                raise RuntimeError("seed broke")
            return features

    with blueprints.temporarily() as registry:

        @registry.register("failing", family=Family.TRANSFORMER)
        def _failing(dim: int) -> Seed:
            seed = registry.create(Family.TRANSFORMER, "norm", dim)
            seed.norm = nn.Sequential(Failing(), seed.norm)
            return seed

        problem = make_problem()
        problem.trainer(Script({1: [Germinate(slot="embed", blueprint="failing")]}), epochs=6).fit()
    (failed,) = problem.recorder.of(SeedFailed)
    assert "seed broke" in failed.error
    (pruned,) = problem.recorder.of(SeedPruned)
    assert "seed broke" in pruned.reason
    alone = make_problem()
    alone.trainer(Script({}), epochs=6).fit()
    assert torch.equal(problem.model.embed.weight, alone.model.embed.weight)


@pytest.mark.parametrize("isolation", ["none", "shadowing"])
def test_seed_that_raises_where_it_is_evaluated_is_gone_before_the_run_is_kept(
    isolation: str, tmp_path: Path
) -> None:
    def fail(module: nn.Module, _: Any) -> None:
        if not module.training and problem.slots["embed"].measurements.reference_loss:
            raise RuntimeError("seed broke")

    with blueprints.temporarily() as registry:

        @registry.register("failing", family=Family.TRANSFORMER)
        def _failing(dim: int) -> Seed:
            seed = registry.create(Family.TRANSFORMER, "norm", dim)
            seed.norm.register_forward_pre_hook(fail)
            return seed

        problem = make_problem(config=esper.SlotConfig(isolation=isolation, thresholds=LENIENT))
        policy = Script({1: [Germinate(slot="embed", blueprint="failing")]})
        trainer = problem.trainer(policy, epochs=3)
        trainer.keeper = Checkpoints(tmp_path)
        assert len(trainer.fit()) == 3
    (failed,) = problem.recorder.of(SeedFailed)
    assert "seed broke" in failed.error
    (pruned,) = problem.recorder.of(SeedPruned)
    assert "seed broke" in pruned.reason


@pytest.mark.parametrize("kept_by", ["keeper", "state"])
def test_seed_that_raises_between_epochs_is_gone_before_the_run_is_kept(
    kept_by: str, problem: Problem, tmp_path: Path
) -> None:
    trainer = problem.trainer(Script({1: [Germinate(slot="embed", blueprint="mlp")]}), epochs=3)
    slot, checkpoints = problem.slots["embed"], Checkpoints(tmp_path)
    for report in trainer.run():
        if report.epoch == 2:
            assert slot.living is not None
            broken = slot.living.register_forward_pre_hook(lambda *_: 1 / 0)
            problem.model(problem.batches[0][0])
            broken.remove()
            assert checkpoints.save(trainer) if kept_by == "keeper" else trainer.state_dict()
            assert slot.living is None
    (failed,) = problem.recorder.of(SeedFailed)
    assert "division by zero" in failed.error


def test_seed_that_raises_before_the_first_step_is_gone_in_one_process_of_several(
    problem: Problem, process_group: None
) -> None:
    problem.slots.replicate()
    trainer = problem.trainer(Script({}), epochs=1)
    slot = problem.slots["embed"]
    slot.germinate("mlp")
    slot.advance(force=True)
    assert slot.living is not None
    broken = slot.living.register_forward_pre_hook(lambda *_: 1 / 0)
    problem.model(problem.batches[0][0])
    broken.remove()
    trainer.fit()
    assert slot.living is None
    (failed,) = problem.recorder.of(SeedFailed)
    assert "division by zero" in failed.error


@pytest.mark.parametrize("epochs_of_data", [0, 1])
def test_data_that_can_be_iterated_only_once_is_refused(
    epochs_of_data: int, problem: Problem
) -> None:
    problem.batches = iter(problem.batches * epochs_of_data)
    trainer = problem.trainer(Script({}), epochs=2)
    with pytest.raises(ValueError, match="no batches in this epoch; pass what can be iterated"):
        trainer.fit()
    assert trainer.epoch == epochs_of_data


def poisoned(problem: Problem, index: int, value: float) -> None:
    features, targets = problem.batches[index]
    problem.batches[index] = (features, torch.full_like(targets, value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_skips_exactly_that_step(value: float) -> None:
    problem, without = make_problem(), make_problem()
    poisoned(problem, 2, value)
    del without.batches[2]
    problem.trainer(Script({}), epochs=1).fit()
    without.trainer(Script({}), epochs=1).fit()
    (skipped,) = problem.recorder.of(StepSkipped)
    assert "loss" in skipped.reason
    for name, value_with in problem.model.state_dict().items():
        assert torch.equal(value_with, without.model.state_dict()[name]), name
    states = [p.optimizer.state_dict()["state"] for p in (problem, without)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k]["exp_avg"], states[1][k]["exp_avg"]) for k in states[0])


def test_a_step_that_was_refused_is_no_step_of_learning() -> None:
    problem = make_problem()
    problem.batches[3] = (problem.batches[3][0], torch.full((32,), math.nan))
    slot = problem.slots["embed"]
    trainer = problem.trainer(esper.PlannedPolicy({}, tend_seeds=False), epochs=2)
    slot.germinate("mlp")
    slot.advance(force=True)
    trainer.fit()
    assert slot.state().steps_in_stage == 2 * len(problem.batches)
    assert slot.measurements.training_steps == 2 * (len(problem.batches) - 1)


def test_non_finite_host_gradient_is_refused_where_clipping_measures_it() -> None:
    problem = make_problem()
    weight = problem.model.embed.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDivergedError, match="the host's gradient norm is not finite"):
        problem.trainer(Script({}), epochs=1, max_gradient_norm=1.0).fit()
    assert len(problem.recorder.of(StepSkipped)) == len(problem.batches)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_run_grows(precision: str) -> None:
    problem = make_problem()
    problem.trainer(grow_mlp(), epochs=24, precision=precision, max_gradient_norm=10.0).fit()
    assert len(problem.recorder.of(SeedCommitted)) == 1


def test_accumulated_steps_equal_steps_on_larger_batches() -> None:
    accumulated, large = make_problem(), make_problem()
    large.batches = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(large.batches[::2], large.batches[1::2], strict=True)
    ]
    accumulated.trainer(grow_mlp(1), epochs=4, accumulation_steps=2).fit()
    large.trainer(grow_mlp(1), epochs=4).fit()
    assert accumulated.slots["embed"].stage is large.slots["embed"].stage is SeedStage.TRAINING
    assert accumulated.slots["embed"].measurements.training_steps == 3 * len(large.batches)
    for mine, other in zip(
        accumulated.slots.host_parameters(), large.slots.host_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_decisions_can_fall_every_few_steps(problem: Problem) -> None:
    trainer = problem.trainer(Script({}), epochs=2, decision_interval_steps=4)
    trainer.fit()
    assert trainer.growth.epoch == 2 * len(problem.batches) // 4


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler_interval": "step"},
        {"decision_interval_steps": 32},
        {"decision_interval_steps": 8},
        {"decision_interval_steps": 8, "scheduler_interval": "step"},
    ],
)
def test_plateau_scheduler_steps_with_each_evaluation_and_not_between(
    settings: dict[str, Any], problem: Problem
) -> None:
    seen: list[float] = []

    class Watched(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:
            seen.append(metrics)
            super().step(metrics, epoch)

    scheduler = Watched(problem.optimizer)
    trainer = problem.trainer(Script({}), epochs=4, scheduler=scheduler, **settings)
    trainer.fit()
    assert seen == trainer.growth.losses


def test_plateau_scheduler_sees_the_held_out_loss(problem: Problem) -> None:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        problem.optimizer, patience=0, cooldown=0
    )
    poisoned_loss = iter([1.0, 2.0, 3.0])
    problem.trainer(
        Script({}), epochs=3, scheduler=scheduler, evaluate=lambda: next(poisoned_loss)
    ).fit()
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_scheduler_for_all_steps_is_refused_where_it_would_step_once_in_an_epoch(
    accumulation_steps: int,
) -> None:
    def made(total_steps: int, **settings: Any) -> esper.Trainer:
        problem = make_problem()
        scheduler = OneCycleLR(problem.optimizer, 0.1, total_steps=total_steps)
        return problem.trainer(Script({}), epochs=3, scheduler=scheduler, **settings)

    steps = {"accumulation_steps": accumulation_steps}
    for total_steps in {3 * 16, 3 * 16 // accumulation_steps}:
        told = f'planned for {total_steps} steps, .* once in each of 3 epochs; .*="step"'
        with pytest.raises(ValueError, match=told):
            made(total_steps, **steps)
        made(total_steps, scheduler_interval="step", **steps)
    for total_steps in (3, 10):  # of its epochs, and of more that are to come
        made(total_steps, **steps)


@pytest.mark.parametrize("result", [np.float32(0.5), torch.tensor(0.5), {"loss": 0.5}])
def test_a_held_out_loss_may_be_any_kind_of_number(result: Any) -> None:
    assert metrics_of(result) == {"loss": 0.5}


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), 0.5])
def test_what_a_loop_measures_is_kept_as_plain_numbers(problem: Problem, value: Any) -> None:
    growth = problem.trainer(Script({}), epochs=1).growth
    growth.after_epoch(lambda: 1.0, train_loss=value)
    growth.measure({"accuracy": value})
    (_, _, measured) = problem.recorder.metrics[-1]
    for kept in (*growth.train_losses, measured["accuracy"]):
        assert (kept, type(kept)) == (0.5, float)


@pytest.mark.parametrize("value", [None, "good", torch.zeros(2)], ids=["None", "str", "two"])
def test_a_metric_that_is_no_number_is_named(problem: Problem, value: Any) -> None:
    growth = problem.trainer(Script({}), epochs=1).growth
    with pytest.raises(TypeError, match="metric 'accuracy' must be a number, got a "):
        growth.measure({"loss": 1.0, "accuracy": value})
    assert problem.recorder.metrics == []


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"accuracy": 1.0}, "without a 'loss'"),
        ({"loss": None}, "metric 'loss' must be a number, got a NoneType"),
        ("good", "as a number"),
        (None, "as a number"),
    ],
)
def test_evaluation_without_a_loss_is_refused(problem: Problem, result: Any, message: str) -> None:
    trainer = problem.trainer(Script({}), epochs=1, evaluate=lambda: result)
    with pytest.raises(TypeError, match=message):
        trainer.fit()


def test_what_cannot_evaluate_is_refused(problem: Problem) -> None:
    growth = problem.trainer(Script({}), epochs=1).growth
    with pytest.raises(TypeError, match=r"evaluate must be a function .*, got 0.5"):
        growth.after_epoch(0.5)
    assert growth.epoch == 0


def test_held_out_without_batches_is_refused(problem: Problem) -> None:
    held_out = esper.HeldOut(problem.model, [], loss=mse_loss)
    with pytest.raises(ValueError, match="no batches"):
        held_out()


def test_held_out_has_one_loss_and_no_metric_takes_its_place(problem: Problem) -> None:
    loss = problem.held_out.loss
    with pytest.raises(ValueError, match=r"metrics must not have a 'loss'.*another name"):
        esper.HeldOut(problem.model, [], loss=loss, metrics={"error": loss, "loss": loss})


def test_held_out_restores_each_modules_own_mode(problem: Problem) -> None:
    problem.model.train()
    problem.model.head.eval()
    problem.held_out()
    assert problem.model.training
    assert not problem.model.head.training


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize(
    "loss",
    [mse_loss, lambda out, y: mse_loss(out, y, reduction="none")[:, None]],
    ids=["mean", "B 1"],
)
def test_loss_that_is_not_per_sample_is_refused_at_the_first_evaluation(
    problem: Problem, loss: Any, *, weigh: bool
) -> None:
    slot = problem.slots["embed"]
    slot.germinate("mlp")
    slot.advance(force=True)
    held_out = esper.HeldOut(problem.model, problem.batches, loss=loss)
    variants = [{"embed": 0.0}, {"embed": 1.0}]
    evaluate = partial(held_out.variant_losses, problem.slots, variants) if weigh else held_out
    with pytest.raises(ValueError, match=r"loss must return one value per sample, .*'none'"):
        evaluate()


def test_evaluating_and_weighing_seeds_leave_the_random_streams_to_the_host() -> None:
    """Iterating a DataLoader draws from torch's; so does the next epoch's shuffle."""

    def drawn_after(*blueprints: str, evaluations: int = 1) -> list[float]:
        problem = make_problem()
        ((inputs, targets),) = problem.held_out.batches
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=128)

        def loss(output: Tensor, target: Tensor) -> Tensor:
            random.random()
            np.random.random()  # noqa: NPY002 – data and losses draw from it
            return problem.held_out.loss(output, target)

        held_out = esper.HeldOut(problem.model, loader, loss=loss)
        growth = esper.Growth(
            problem.slots,
            problem.optimizer,
            policy=esper.PlannedPolicy({}, tend_seeds=False),
            sinks=[problem.recorder],
        )
        slot = problem.slots["embed"]
        for blueprint in blueprints:
            slot.germinate(blueprint)
            slot.advance(force=True)
            slot.measurements.training_steps = 1000
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        for _ in range(evaluations):
            growth.after_epoch(held_out)
        assert len(problem.recorder.of(AmplitudeSearched)) == len(blueprints)
        return [float(torch.rand(())), random.random(), np.random.random()]  # noqa: NPY002

    assert drawn_after("mlp") == drawn_after() == drawn_after(evaluations=0)


def test_a_seed_behind_a_host_that_is_frozen_can_get_in() -> None:
    """There is no gradient of the host to compare the seed's with."""
    problem = make_problem()
    for module in (problem.model.embed, problem.model.head):
        module.requires_grad_(requires_grad=False)
    policy = esper.PlannedPolicy({2: [Germinate(slot="embed", blueprint="mlp")]})
    trainer = problem.trainer(policy, epochs=18)
    trainer.fit()
    assert trainer.growth.step == 18 * len(problem.batches), (
        "before it nothing learns, and no step fails"
    )
    (first, *_) = [e.result for e in problem.recorder.of(GateEvaluated) if e.result.gate is Gate.G2]
    assert "gradient_ratio" not in {check.name for check in first.checks}
    assert len(problem.recorder.of(SeedCommitted)) == 1


def test_a_loss_that_is_detached_from_a_host_that_learns_is_an_error(problem: Problem) -> None:
    trainer = problem.trainer(
        esper.PlannedPolicy({}),
        epochs=1,
        loss=lambda output, target: mse_loss(output, target).detach(),
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.fit()


def test_what_a_decision_is_due_for_is_no_state_to_go_on_from(problem: Problem) -> None:
    trainer = problem.trainer(esper.PlannedPolicy({}), epochs=2)
    stops = trainer.stops()
    assert isinstance(next(stops), esper.training.DecisionDue)
    with pytest.raises(RuntimeError, match=r"a decision is due.*growth\.conclude"):
        trainer.state_dict()
    trainer.growth.conclude([])
    next(stops)
    trainer.state_dict()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_decision_that_fails_is_over_and_the_loop_can_go_on(error: type[BaseException]) -> None:
    class Failing(Script):
        def decide(self, state: GrowthState) -> Sequence[Action]:
            if state.epoch == 1:
                raise error
            return super().decide(state)

    problem = make_problem()
    policy = Failing({3: [Germinate(slot="embed", blueprint="mlp")]})
    growth, slot = problem.trainer(policy, epochs=3).growth, problem.slots["embed"]
    growth.apply(Germinate(slot="embed", blueprint="mlp"))
    growth.apply(Prune(slot="embed"))
    with pytest.raises(error):
        growth.after_epoch(problem.held_out)
    assert slot.stage is SeedStage.EMBARGOED, "slots, too, have let the epoch end"
    assert problem.recorder.of(StageChanged)[-1].to_stage is slot.stage
    growth.state_dict()
    for _ in range(2):
        growth.after_epoch(problem.held_out)
    assert slot.living is not None


class Counting(Script):
    """Gives out what it changes afterwards, as many do."""

    def __init__(self) -> None:
        super().__init__({})
        self.counted = {"decisions": 0}

    def state_dict(self) -> dict[str, int]:
        return self.counted

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.counted.update(state)


def test_a_state_holds_what_a_policy_remembers_as_it_was_then() -> None:
    growth = make_problem().trainer(Counting(), epochs=1).growth
    state = growth.state_dict()
    growth.policy.counted["decisions"] = 3
    assert state["policy"]["state"] == {"decisions": 0}


STATE = make_problem().trainer(esper.PlannedPolicy({}), 1).growth.state_dict()


@pytest.mark.parametrize(
    ("part", "field", "of"),
    [
        *((None, field, "growth") for field in sorted(STATE)),
        ("isolation_monitor", "records", "the isolation monitor"),
        ("meter", "training", "the meter"),
        ("slots", "breakers", "the slots"),
    ],
)
def test_a_state_that_lacks_a_field_is_refused_and_nothing_changes(
    part: str | None, field: str, of: str
) -> None:
    grown, fresh = (make_problem().trainer(Counting(), epochs=1).growth for _ in range(2))
    grown.apply(Germinate(slot="embed", blueprint="mlp"))
    grown.policy.counted["decisions"] = 3
    state, before = grown.state_dict(), fresh.state_dict()
    del (state if part is None else state[part])[field]
    with pytest.raises(ValueError, match=f"the state of {of} lacks {field}"):
        fresh.load_state_dict(state)
    assert fresh.slots["embed"].stage is esper.SeedStage.DORMANT
    assert fresh.state_dict() == before


class Forgetful(Script):
    """Called as one that remembers something, and does not."""

    name = "heuristic"


POLICIES: dict[str, Callable[[], esper.Policy]] = {
    "heuristic": esper.HeuristicPolicy,
    "forgetful": lambda: Forgetful({}),
    "other chooser": lambda: esper.HeuristicPolicy(chooser=UCB1Chooser()),
    "ucb1": ucb1_policy,
    "random": RandomPolicy,
    "schedule": GrowthSchedulePolicy,
    "planned": lambda: esper.PlannedPolicy({}),
    "script": lambda: Script({}),
}


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ("heuristic", "ucb1", "policy of the run was 'heuristic', and is 'ucb1' here"),
        ("random", "heuristic", "policy of the run was 'random', and is 'heuristic' here"),
        ("schedule", "random", "policy of the run was 'schedule', and is 'random' here"),
        ("planned", "schedule", "policy of the run was 'planned', and is 'schedule' here"),
        ("ucb1", "planned", "policy of the run was 'ucb1', and is 'planned' here"),
        ("script", "planned", "policy of the run was 'script', and is 'planned' here"),
        ("forgetful", "heuristic", "policy 'heuristic' has a state, and that of the run had none"),
        ("heuristic", "forgetful", "policy 'heuristic' has no state, and that of the run had one"),
        ("heuristic", "other chooser", "chose by EvenChooser, and chooses by UCB1Chooser here"),
        ("other chooser", "heuristic", "chose by UCB1Chooser, and chooses by EvenChooser here"),
    ],
)
def test_a_state_of_another_policys_run_is_refused_and_nothing_changes(
    saved: str, here: str, message: str
) -> None:
    grown, fresh = (make_problem().trainer(POLICIES[p](), epochs=1).growth for p in (saved, here))
    grown.apply(Germinate(slot="embed", blueprint="mlp"))
    before = fresh.state_dict()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(grown.state_dict())
    assert fresh.slots["embed"].stage is SeedStage.DORMANT
    assert fresh.state_dict() == before


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_of_the_same_policys_run_is_taken_unless_its_slots_are_others(policy: str) -> None:
    grown, fresh = (make_problem().trainer(POLICIES[policy](), epochs=20).growth for _ in range(2))
    if policy in {"heuristic", "other chooser", "ucb1", "random"}:
        flat = {"epoch": 9, "losses": (1.0,) * 9}
        assert grown.policy.decide(grown.state().model_copy(update=flat)), "to be remembered"
        assert grown.state_dict()["policy"] != fresh.state_dict()["policy"]
    grown.apply(Germinate(slot="embed", blueprint="mlp"))
    state, before = grown.state_dict(), fresh.state_dict()
    elsewhere = {**state["slots"], "slots": {"elsewhere": state["slots"]["slots"]["embed"]}}
    with pytest.raises(ValueError, match="the slots were elsewhere, and are embed"):
        fresh.load_state_dict({**state, "slots": elsewhere})
    assert fresh.state_dict() == before
    fresh.load_state_dict(state)
    assert fresh.state_dict()["policy"] == state["policy"]
    assert fresh.slots["embed"].stage is SeedStage.TRAINING


class Unhashable(Counting):
    """As a dataclass is that compares by value."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)


class Slotted:
    """Cannot be referred to weakly, so that nobody could tell when it is gone."""

    __slots__ = ("counted",)
    name, decide = "slotted", Script({}).decide

    state_dict, load_state_dict = Counting.state_dict, Counting.load_state_dict


def concluded(policy: esper.Policy, problem: Problem) -> esper.training.Growth:
    growth = problem.trainer(policy, epochs=1).growth
    growth.after_epoch(lambda: 1.0)
    return growth


@pytest.mark.parametrize("policy", [esper.HeuristicPolicy, RandomPolicy, Counting, Unhashable])
def test_a_policy_that_remembers_another_run_is_refused_unless_it_is_told_to_forget(
    policy: Callable[[], esper.Policy],
) -> None:
    used, problem, other = policy(), make_problem(), make_problem()
    state = concluded(used, problem).state_dict()
    problem.slots.unbind()
    concluded(used, problem)  # the same model with another Growth
    with pytest.raises(ValueError, match=f"this {policy.__name__} has decided for another model"):
        concluded(used, other)
    concluded(policy(), make_problem())
    other.slots.unbind()
    resumed = other.trainer(used, epochs=1).growth
    resumed.load_state_dict(state)
    resumed.after_epoch(lambda: 1.0)


@pytest.mark.parametrize("policy", [lambda: esper.PlannedPolicy({}), lambda: Script({}), Slotted])
def test_a_policy_that_remembers_nothing_or_is_never_seen_to_go_decides_for_several_runs(
    policy: Callable[[], esper.Policy],
) -> None:
    used = policy()
    for _ in range(2):
        concluded(used, make_problem())


@pytest.mark.parametrize(("budget", "committed"), [(1e6, 1), (1e-6, 0)])
def test_step_time_budget_is_judged_where_one_is_set(budget: float, committed: int) -> None:
    limits = TEST_CONFIG.thresholds.model_copy(update={"max_step_time_ratio": budget})
    problem = make_problem(config=TEST_CONFIG.model_copy(update={"thresholds": limits}))
    problem.trainer(grow_mlp(), epochs=24).fit()
    assert len(problem.recorder.of(SeedCommitted)) == committed
    (judged, *_) = [
        e.result for e in problem.recorder.of(GateEvaluated) if e.result.gate is Gate.G4
    ]
    assert "step_time_ratio" in {check.name for check in judged.checks}


def test_seeds_of_one_decision_have_the_same_step_time_to_compare_with() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16))
    slots = esper.attach(model, "[01]", example=torch.randn(2, 4), config=TEST_CONFIG)
    optimizer = torch.optim.Adam(model.parameters())
    plan = [Germinate(slot=path, blueprint="norm") for path in ("0", "1")]
    growth = esper.Growth(slots, optimizer, policy=esper.PlannedPolicy({1: plan}))
    for _ in range(2):
        for _ in range(12):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            growth.after_step()
        growth.after_epoch(lambda: 1.0)
    ratios = [slot.measurements.step_time_ratio for slot in slots.values()]
    assert None not in ratios
    assert ratios[0] == ratios[1]


def test_a_frugal_policy_has_only_those_seeds_weighed_that_it_asks_for() -> None:
    class Late(Script):
        reads_losses = False

        def weighs(self, state: GrowthState) -> list[str]:
            return ["embed"] if state.epoch >= 6 else []

    script = {2: [Germinate(slot="embed", blueprint="mlp")]}
    problem = make_problem()
    problem.trainer(Late(script), epochs=7).fit()
    every = make_problem()
    every.trainer(Script(script), epochs=7).fit()
    searched = [r.epoch for r in every.recorder.records if isinstance(r.event, AmplitudeSearched)]
    late = [r.epoch for r in problem.recorder.records if isinstance(r.event, AmplitudeSearched)]
    assert min(searched) < 6
    assert late == [epoch for epoch in searched if epoch >= 6]


@pytest.mark.parametrize(
    ("interval", "means"),
    [
        (None, [8.5, 24.5]),
        (4, [2.5 + 4 * k for k in range(8)]),
        (6, [3.5 + 6 * k for k in range(5)]),
    ],
    ids=["each epoch", "4 steps", "6 steps, across an epoch's end"],
)
def test_a_policy_sees_the_mean_training_loss_since_its_last_decision(
    interval: int | None, means: list[float]
) -> None:
    """Step n has loss n, whatever the model."""

    class Watching(Script):
        seen: tuple[float, ...] = ()

        def decide(self, state: GrowthState) -> Sequence[Action]:
            self.seen = state.train_losses
            return []

    policy, steps = Watching({}), itertools.count(1)
    trainer = make_problem().trainer(
        policy,
        epochs=2,
        decision_interval_steps=interval,
        loss=lambda output, target: 0.0 * output.mean() + next(steps),
    )
    reports = trainer.fit()
    assert policy.seen == pytest.approx(means)
    assert [report.train_loss for report in reports] == [8.5, 24.5]
