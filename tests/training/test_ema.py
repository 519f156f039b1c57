"""An average of weights that follows growth by name, beside torch's, which goes by position."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper import SeedStage, SlotConfig
from esper.training.growth_driver import GrowthDriver
from growth_problem import Problem, make_problem

INPUTS = torch.linspace(-1.0, 1.0, 40).reshape(5, 8)
DECAY = 0.8


class Run:
    def __init__(self, isolation: str = "none") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)
        )
        config = SlotConfig(max_committed=3, embargo_epochs=0, isolation=isolation)
        self.slots = esper.attach(self.model, ["0", "3"], example=INPUTS, config=config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.slots.bind(self.optimizer)
        self.ema = esper.EMA(self.slots, decay=DECAY)
        self.by_hand = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def grow(self, path: str, blueprint: str, stage: SeedStage) -> None:
        self.slots[path].germinate(blueprint)
        while self.slots[path].stage is not stage:
            self.slots[path].advance(force=True)

    def step(self, times: int = 3) -> None:
        for _ in range(times):
            mse_loss(self.model(INPUTS), torch.ones(5, 2)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.slots.tick()
            self.ema.update()
            for name, weight in self.model.named_parameters():
                known = self.by_hand.setdefault(name, weight.detach().clone())
                self.by_hand[name] = known.lerp(weight.detach(), 1.0 - DECAY)

    def check(self) -> None:
        averages = self.ema.averages()
        assert list(averages) == [name for name, _ in self.model.named_parameters()]
        for name, average in averages.items():
            torch.testing.assert_close(average, self.by_hand[name], rtol=1e-6, atol=1e-7, msg=name)


def test_without_growth_it_is_torchs_average() -> None:
    run = Run()
    reference = AveragedModel(copy.deepcopy(run.model), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    reference.update_parameters(run.model)  # the first takes the weights as they are
    for _ in range(5):
        run.step(1)
        reference.update_parameters(run.model)
    wanted = dict(reference.module.named_parameters())
    for name, average in run.ema.averages().items():
        torch.testing.assert_close(average, wanted[name].detach(), rtol=1e-6, atol=1e-7)


def test_seeds_join_stay_when_they_are_committed_and_leave_when_they_are_pruned() -> None:
    run = Run()
    run.step()
    run.grow("0", "mlp", SeedStage.PROBATIONARY)
    run.grow("3", "mlp", SeedStage.BLENDING)
    run.slots["3"].set_alpha_target(1.0, 0)
    run.step()
    run.check()
    run.slots["0"].commit()
    names = [name for name in run.by_hand if name.startswith("3.") and "branches" in name]
    run.slots["3"].prune()
    run.step()
    for name in names:
        del run.by_hand[name]
    run.check()


@pytest.mark.parametrize("last_stage", [SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_the_average_of_a_seed_is_rescaled_as_the_seed_is(last_stage: SeedStage) -> None:
    """Else it would begin to blend many times too large, or too small."""
    run = Run(isolation="shadowing")
    run.grow("0", "mlp", SeedStage.TRAINING)
    run.step(6)
    slot = run.slots["0"]
    before = {name: value.clone() for name, value in run.ema.averages().items()}
    slot.measurements.best_amplitude = 0.25
    parameters = {p for layer in slot.seed.output_layers for p in layer.parameters()}
    names = [name for name, p in run.model.named_parameters() if p in parameters]
    assert all(before[name].any() for name in names)
    with slot.rescaled():  # where it is weighed, by an evaluation of the average perhaps
        assert all(torch.equal(run.ema.averages()[name], 0.25 * before[name]) for name in names)
    run.check()
    while slot.stage is not last_stage:
        slot.advance(force=True)
    for name in names:
        run.by_hand[name] *= 0.25
    run.check()
    kept = run.ema.state_dict()
    run.step()
    run.check()
    run.ema.load_state_dict(kept)
    assert all(torch.equal(run.ema.averages()[name], 0.25 * before[name]) for name in names)


def test_a_seed_with_the_name_of_a_pruned_one_begins_its_own_average() -> None:
    run = Run()
    run.grow("3", "mlp", SeedStage.PROBATIONARY)
    run.step(9)
    before = set(run.ema.averages())
    run.slots["3"].prune()
    while run.slots["3"].stage is not SeedStage.DORMANT:
        run.slots["3"].advance(force=True)
    run.grow("3", "mlp", SeedStage.PROBATIONARY)
    assert set(run.ema.averages()) == before
    for name, weight in run.slots["3"].branches.named_parameters():
        (average,) = [v for k, v in run.ema.averages().items() if k.endswith(f"branches.{name}")]
        assert torch.equal(average, weight.detach())


def test_the_model_has_the_averages_for_a_while() -> None:
    run = Run()
    run.grow("0", "mlp", SeedStage.PROBATIONARY)
    run.step(6)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    addresses = [p.data_ptr() for p in run.model.parameters()]
    inside = {}

    def fails() -> None:
        with run.ema.applied():
            inside.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(torch.equal(inside[name], run.ema.averages()[name]) for name in weights)
    assert all(torch.equal(p.detach(), weights[n]) for n, p in run.model.named_parameters())
    assert [p.data_ptr() for p in run.model.parameters()] == addresses


class InterruptedCopies(TorchDispatchMode):
    """Is interrupted, as by Ctrl-C, in the third copy."""

    num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_copies += func is torch.ops.aten.copy_.default
        if self.num_copies == 3:
            self.num_copies += 1
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_a_model_that_is_interrupted_on_its_way_to_the_averages_has_its_weights() -> None:
    run = Run()
    run.step(6)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), InterruptedCopies(), run.ema.applied():
        pass
    assert all(torch.equal(p.detach(), weights[n]) for n, p in run.model.named_parameters())


def test_a_callbacks_average_takes_in_no_step_that_a_loss_scaler_has_skipped() -> None:
    problem = make_problem()
    driver = driver_of(problem, esper.EMA(problem.slots, decay=DECAY))
    for parameter in problem.model.parameters():
        parameter.data.add_(1.0)
    before = copy.deepcopy(driver.ema.averages())
    driver.after_step()
    assert all(map(torch.equal, before.values(), driver.ema.averages().values()))
    problem.optimizer.step()
    driver.after_step()
    assert not any(map(torch.equal, before.values(), driver.ema.averages().values()))


def test_a_callbacks_state_with_another_average_is_refused_before_anything_has_changed() -> None:
    problem = make_problem()
    driver = driver_of(problem, None)
    other = make_problem()
    state = driver_of(other, esper.EMA(other.slots)).state_dict()
    state["growth"]["epoch"] = 7
    with pytest.raises(ValueError, match="the run had an average of its weights"):
        driver.load_state_dict(state)
    assert driver.growth.epoch == 0


def driver_of(problem: Problem, ema: esper.EMA | None) -> GrowthDriver:
    growth = esper.Growth(problem.slots, problem.optimizer, policy=esper.PlannedPolicy({}))
    return GrowthDriver(
        growth, problem.model, evaluate=lambda: 1.0, decision_interval_steps=None, ema=ema
    )


def test_the_trainer_averages_steps_that_were_made() -> None:
    problem = make_problem()
    trainer = problem.trainer(esper.PlannedPolicy({}), epochs=2)
    trainer.ema = esper.EMA(problem.slots, decay=DECAY)
    by_hand: dict[str, Tensor] = {
        n: p.detach().clone() for n, p in problem.model.named_parameters()
    }

    def after(*_: Any) -> None:
        for name, weight in problem.model.named_parameters():
            by_hand[name] = by_hand[name].lerp(weight.detach(), 1.0 - DECAY)

    problem.optimizer.register_step_post_hook(after)
    trainer.fit()
    for name, average in trainer.ema.averages().items():
        torch.testing.assert_close(average, by_hand[name], rtol=1e-6, atol=1e-7)


def test_averages_that_pair_by_position_are_refused_with_the_reason() -> None:
    problem = make_problem()
    foreign = AveragedModel(problem.model)
    growth = esper.Growth(problem.slots, problem.optimizer, policy=esper.PlannedPolicy({}))
    with pytest.raises(TypeError, match=r"AveragedModel pairs weights and averages by position"):
        esper.Trainer(
            growth,
            problem.batches,
            loss=mse_loss,
            evaluate=lambda: 1.0,
            config=esper.TrainerConfig(epochs=1),
            ema=foreign,
        )
    ema = esper.EMA(problem.slots)
    before = copy.deepcopy(ema.state_dict())
    for state in (foreign.state_dict(), problem.model.state_dict()):
        with pytest.raises(ValueError, match="by position, which growth changes"):
            ema.load_state_dict(state)
    other = Run()
    with pytest.raises(ValueError, match=r"the averages lack embed.bias, .* beyond"):
        ema.load_state_dict(other.ema.state_dict())
    assert all(map(torch.equal, before["averages"].values(), ema.averages().values()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_of_what_cannot_be_averaged_it_has_the_value(dtype: torch.dtype) -> None:
    run = Run()
    codes = nn.Parameter(torch.tensor([1.0, 0.0]).to(dtype), requires_grad=False)
    run.model.register_parameter("codes", codes)
    run.ema = esper.EMA(run.slots, decay=DECAY)
    codes.data.copy_(torch.tensor([0.0, 1.0]))
    run.ema.update()
    assert run.ema.averages()["codes"].dtype == dtype
    assert run.ema.averages()["codes"].float().tolist() == [0.0, 1.0]


def test_weights_that_are_assigned_begin_their_averages_anew() -> None:
    run = Run()
    assigned = {name: value + 1 for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(assigned, assign=True)
    run.ema.update()
    assert run.ema.state_dict()["averages"].keys() == dict(run.model.named_parameters()).keys()
    for name, average in run.ema.averages().items():
        assert torch.equal(average, assigned[name])
        assert average.data_ptr() != run.model.get_parameter(name).data_ptr()


def test_an_average_follows_another_head_and_takes_its_own_state_back_at_any_time() -> None:
    run = Run()
    run.step(2)
    run.model[4] = nn.Linear(8, 2)
    before = run.model[4].bias.detach().clone()
    run.ema.update()
    with torch.no_grad():
        run.model[4].bias.add_(1.0)
    run.ema.update()
    torch.testing.assert_close(run.ema.averages()["4.bias"], before + 1.0 - DECAY)
    run.model[4] = nn.Linear(8, 2)
    run.ema.load_state_dict(run.ema.state_dict())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        esper.EMA(make_problem().slots, decay=decay)


def test_a_model_by_itself_is_refused() -> None:
    with pytest.raises(TypeError, match=r"as esper\.attach returns it, got a Linear"):
        esper.EMA(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_averages_go_where_the_weights_go() -> None:
    run = Run()
    run.step()
    run.grow("0", "mlp", SeedStage.TRAINING)
    run.step()
    before = {name: value.clone() for name, value in run.ema.averages().items()}
    run.model.to(torch.bfloat16)
    run.ema.update()
    for name, value in run.ema.averages().items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), before[name], rtol=0.05, atol=0.05)
