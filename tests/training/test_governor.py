"""Bad steps are refused, a run goes back where that does not help, and the seed at fault goes."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.actions import Action, Germinate, GrowthState, Prune
from esper.lifecycle.events import (
    GradientHealthMeasured,
    RunWentBack,
    SeedBlamed,
    SeedPruned,
    StepSkipped,
)
from esper.seeds import Family, Seed, blueprints
from esper.training.governor import Governor, GovernorConfig
from esper.training.run_cost import Cost, CostMeter
from esper.training.safeguard import TrainingDivergedError
from growth_problem import Recorder

SNAPSHOTS = {"snapshot_steps": 10, "history_steps": 8}
STEPS = 16


class Host(nn.Module):
    """With running statistics behind the slot, which a NaN would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.norm(self.embed(features))))
        return self.head(hidden).squeeze(1)


class Script:
    """Germinates a blueprint after the second epoch, and may prune it after the fourth."""

    name = "script"

    def __init__(self, blueprint: str | None = None, prune: Prune | None = None) -> None:
        self.blueprint = blueprint
        self.prune = prune

    def decide(self, state: GrowthState) -> list[Action]:
        if self.prune is not None and state.epoch == 4:
            return [self.prune]
        if self.blueprint is None or state.epoch != 2:
            return []
        return [Germinate(slot=state.slots[0].path, blueprint=self.blueprint)]


class Run:
    """A run whose steps are counted and can be tampered with before they are made."""

    def __init__(
        self,
        blueprint: str | None = None,
        *,
        slot: str | list[str] = "embed",
        isolation: str = "none",
        accumulation_steps: int = 1,
        **governor: Any,
    ) -> None:
        torch.manual_seed(0)
        self.host = Host()
        self.made = 0
        """Steps, those after going back counted again."""
        self.every_loss: dict[int, list[float]] = {}
        """By step, of each time that it was made."""
        self.last_loss = math.nan
        self.tamper: dict[int, Any] = {}
        self.spoilt: set[int] = set()
        """Steps, by how many were made, whose batch is multiplied by that factor."""
        self.factor = math.nan
        features = torch.randn(STEPS * 8, 4)
        self.data = list(zip(features.split(8), features.prod(1).tanh().split(8), strict=True))
        slots = esper.attach(
            self.host, slot, example=features[:2], config=SlotConfig(isolation=isolation)
        )
        optimizer = torch.optim.AdamW(self.host.parameters(), lr=1e-2)
        self.recorder = Recorder()
        growth = esper.Growth(
            slots, optimizer, policy=Script(blueprint), max_epochs=6, sinks=[self.recorder]
        )
        config = esper.TrainerConfig(
            epochs=6,
            accumulation_steps=accumulation_steps,
            governor=GovernorConfig(**SNAPSHOTS | governor),
        )
        self.trainer = esper.Trainer(
            growth, self, loss=self.loss, evaluate=lambda: 1.0, config=config, keeper=self
        )

    def fit(self) -> None:
        torch.manual_seed(1)
        self.trainer.fit()

    def after_step(self, trainer: esper.Trainer) -> None:
        self.every_loss.setdefault(trainer.growth.step, []).append(self.last_loss)

    def after_epoch(self, trainer: esper.Trainer) -> None: ...

    @property
    def losses(self) -> dict[int, float]:
        """By step; of one that was made again, the last."""
        return {step: losses[-1] for step, losses in self.every_loss.items()}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in self.data:
            self.made += 1
            if self.made in self.tamper:
                self.tamper.pop(self.made)()
            factor = self.factor if self.made in self.spoilt else 1.0
            yield features * factor, targets * factor

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        value = mse_loss(output, target)
        self.last_loss = float(value.detach())
        return value

    def of(self, *kinds: Any) -> list[Any]:
        return self.recorder.of(*kinds)


@pytest.mark.parametrize("snapshot_steps", [10, None])
@pytest.mark.parametrize("factor", [math.nan, 1e6])
def test_a_single_bad_batch_is_skipped_and_leaves_the_model_as_it_was(
    factor: float, snapshot_steps: int | None
) -> None:
    """The running statistics of its forward included, and what is kept to go back to."""
    run = Run("mlp", snapshot_steps=snapshot_steps)
    run.spoilt, run.factor = {40}, factor
    states: list[dict[str, Tensor]] = []

    def note(_: esper.Trainer) -> None:
        values = run.host.state_dict().items()
        states.append({n: v.clone() for n, v in values if torch.is_tensor(v)})

    run.after_step = note
    run.fit()
    assert len(run.of(StepSkipped)) == 1
    assert not run.of(RunWentBack)
    assert run.trainer.growth.step == 6 * STEPS
    before, after = states[38:40]
    counted = "norm.num_batches_tracked"
    assert after.pop(counted) == before.pop(counted) + 1
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not torch.equal(after["norm.running_mean"], states[40]["norm.running_mean"])


def test_a_bad_batch_is_over_where_the_optimizer_trains_a_part_of_the_host() -> None:
    """What nothing trains has gradients as well: NaN once, and no optimizer drops them."""
    norms = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        host = Host()
        host.embed.requires_grad_(not frozen)
        features = torch.randn(STEPS * 8, 4)
        data = list(zip(features.split(8), features.prod(1).tanh().split(8), strict=True))
        data[5] = (data[5][0] * math.nan, data[5][1])
        slots = esper.attach(host, "norm", example=features[:2])
        recorder = Recorder()
        optimizer = torch.optim.AdamW(host.head.parameters(), lr=1e-2)
        growth = esper.Growth(slots, optimizer, policy=Script(), sinks=[recorder])
        config = esper.TrainerConfig(epochs=1, max_gradient_norm=0.1)
        trainer = esper.Trainer(growth, data, loss=mse_loss, evaluate=lambda: 1.0, config=config)
        trainer.fit()
        assert [event.reason for event in recorder.of(StepSkipped)] == ["the loss is not finite"]
        assert all(parameter.grad is None for parameter in host.parameters())
        norms[frozen] = host.head.weight.detach().clone()
    assert torch.equal(norms[False], norms[True]), "it is clipped by what is trained"


def test_a_run_whose_weights_are_spoilt_goes_back_and_is_what_it_would_have_been() -> None:
    """As a flipped bit would; random streams, data, optimizer and statistics go back too."""
    run, untouched = Run(), Run()

    def spoil() -> None:
        with torch.no_grad():
            run.host.head.weight.mul_(1e6)

    run.tamper = {37: spoil}
    run.fit()
    untouched.fit()
    (back,) = run.of(RunWentBack)
    assert (back.from_step, back.to_step, back.same_batches) == (39, 30, True)
    assert back.priority == "critical"
    assert [event.value > 1e3 for event in run.of(StepSkipped)] == [True] * 3
    state = untouched.host.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.host.state_dict().items())
    assert run.losses == untouched.losses
    assert run.trainer.growth.step == untouched.trainer.growth.step == 6 * STEPS


@pytest.mark.parametrize("has_trained", [False, True])
def test_a_run_that_goes_on_has_at_once_what_to_go_back_to(has_trained: bool) -> None:
    run, untouched = Run(), Run()
    if has_trained:  # to steps that are none of the run that goes on
        run.fit()
        run.made = 0
    at_33: list[Any] = []

    def stop(trainer: esper.Trainer) -> None:
        if trainer.growth.step == 33:
            at_33.append(trainer.state_dict())
            raise KeyboardInterrupt

    cut = Run()
    cut.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit()

    def spoil() -> None:
        with torch.no_grad():
            run.host.head.weight.mul_(1e6)

    run.trainer.load_state_dict(at_33[0])
    run.tamper = {4: spoil}  # the first batch of the epoch is drawn again, and dropped
    run.fit()
    untouched.fit()
    (back,) = run.of(RunWentBack)
    assert (back.from_step, back.to_step) == (38, 33)
    state = untouched.host.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.host.state_dict().items())


def test_what_a_run_that_went_back_threw_away_was_paid_for() -> None:
    def spent(run: Run) -> Cost:
        growth = run.trainer.growth
        growth.meter = CostMeter(growth.slots, count_flops=True, clock=lambda: float(run.made))
        run.fit()
        return growth.meter.cost.training

    run, untouched = Run(), Run()
    run.spoilt = set(range(37, 40))
    cost, least = spent(run), spent(untouched)
    (back,) = run.of(RunWentBack)
    assert least.flops
    num_batches, thrown_away = 6 * STEPS, back.from_step - back.to_step
    assert cost.flops == least.flops // num_batches * (num_batches + thrown_away)
    assert cost.seconds == run.made > untouched.made == least.seconds


def test_bad_data_is_passed_by_the_second_time() -> None:
    run = Run()
    drawn_again = 39 + 14 - 30  # 39 batches before going back to step 30, 14 into its epoch
    run.spoilt = {*range(37, 40), *range(drawn_again + 37, drawn_again + 40)}
    run.fit()
    told = [(event.to_step, event.same_batches) for event in run.of(RunWentBack)]
    assert told == [(30, True), (30, False)]
    first, again, other = run.every_loss[32]
    assert first == again != other
    assert len(run.recorder.of(StepSkipped)) == 6
    assert all(torch.isfinite(value).all() for value in run.host.state_dict().values())


def test_what_stays_bad_ends_the_run_with_an_error() -> None:
    run = Run()
    run.spoilt = set(range(37, 500))
    with pytest.raises(TrainingDivergedError, match=r"again, 2 times after going back to step 30"):
        run.fit()
    assert all(torch.isfinite(p).all() for p in run.host.parameters())


@pytest.mark.parametrize("settings", [{"snapshot_steps": None}, {"max_bad_steps": 99}])
def test_without_snapshots_bad_steps_are_skipped_and_no_more(settings: dict[str, Any]) -> None:
    run = Run(**settings)
    run.spoilt = set(range(37, 50))
    run.fit()
    assert len(run.of(StepSkipped)) == 13
    assert not run.of(RunWentBack)


@pytest.mark.parametrize("settings", [{}, {"snapshot_steps": None}])
def test_an_epoch_without_one_step_that_could_be_made_ends_the_run(
    settings: dict[str, Any],
) -> None:
    run = Run(**settings)
    run.spoilt = set(range(500))
    with pytest.raises(TrainingDivergedError, match=r"no step of epoch 1 .*the loss is not finite"):
        run.fit()
    assert run.made == STEPS
    one_was_made = Run(**settings)
    one_was_made.spoilt = set(range(1, STEPS))
    one_was_made.fit()
    assert len(one_was_made.recorder.of(StepSkipped)) == STEPS - 1


def test_where_no_step_could_be_made_a_run_ends_with_its_first_decision() -> None:
    run = Run()
    run.data *= 5
    run.spoilt = set(range(500))
    config = run.trainer.config
    run.trainer.config = config.model_copy(update={"decision_interval_steps": 60})
    with pytest.raises(TrainingDivergedError, match=r"no step of epoch 1 .*the loss is not finite"):
        run.fit()
    assert run.made == 60


def test_a_state_that_is_refused_leaves_a_run_what_to_go_back_to() -> None:
    run = Run()
    other = run.trainer.state_dict()
    other["growth"]["policy"]["name"] = "another"

    def refused() -> None:
        with pytest.raises(ValueError, match="the policy of the run was 'another'"):
            run.trainer.load_state_dict(other)

    run.tamper[35] = refused
    run.spoilt = {37, 38, 39}
    run.fit()
    (back,) = run.of(RunWentBack)
    assert back.to_step == 30


class Bomb(Seed):
    """Emits NaN, or far too much, in some forwards."""

    emits = math.nan
    bad = range(31, 9999)
    """The number of the forward, from 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.calls = 0

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.linear,)

    def increment(self, features: Tensor) -> Tensor:
        self.calls += self.training
        increment = self.linear(features)
        return increment + self.emits if self.calls in self.bad else increment


def make_bomb(dim: int) -> Seed:
    return Bomb(dim)


@pytest.mark.parametrize(
    ("emits", "slot"), [(math.nan, "embed"), (math.nan, "dropout"), (1e7, "dropout")]
)
def test_the_seed_that_bad_steps_are_the_fault_of_is_pruned(
    emits: float, slot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of the running statistics, which it spoils, and behind them."""
    monkeypatch.setattr(Bomb, "emits", emits)
    with blueprints.temporarily() as registry:
        registry.register("bomb", family=Family.TRANSFORMER)(make_bomb)
        run = Run("bomb", slot=slot)
        run.fit()
    (event,) = run.of(SeedBlamed)
    assert (event.slot, event.blueprint, event.priority) == (slot, "bomb", "critical")
    assert not event.loss <= 1e3
    assert event.loss_without < 10.0
    (pruned,) = run.of(SeedPruned)
    assert pruned.reason == "steps are bad with it, and not without"
    assert len(run.of(StepSkipped)) == 3
    assert not run.of(RunWentBack), "no step of the host is lost"
    assert all(torch.isfinite(value).all() for value in run.host.state_dict().values())
    assert run.trainer.growth.step == 6 * STEPS


def test_a_run_goes_on_after_an_epoch_that_was_all_the_fault_of_a_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Bomb, "bad", ())
    with blueprints.temporarily() as registry:
        registry.register("bomb", family=Family.TRANSFORMER)(make_bomb)
        run = Run("bomb", max_bad_steps=STEPS)
        run.tamper = {3 * STEPS + 1: lambda: monkeypatch.setattr(Bomb, "bad", range(9999))}
        run.trainer.growth.isolation_monitor.interval_steps = None  # it calls the seed as well
        run.fit()
    records = run.recorder.records
    skipped = [record.step for record in records if isinstance(record.event, StepSkipped)]
    assert skipped == [*range(3 * STEPS, 4 * STEPS)]
    assert run.of(SeedBlamed)
    assert run.trainer.growth.step == 6 * STEPS


def test_the_seed_at_fault_is_found_behind_one_that_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with blueprints.temporarily() as registry:
        registry.register("bomb", family=Family.TRANSFORMER)(make_bomb)
        run = Run("bomb", slot=["embed", "dropout"])
        later = Germinate(slot="dropout", blueprint="mlp")
        run.tamper = {2 * STEPS + 5: lambda: run.trainer.growth.apply(later)}
        run.fit()
    assert [event.slot for event in run.of(SeedBlamed)] == ["embed"]
    assert not run.of(RunWentBack)
    assert run.trainer.growth.slots["dropout"].in_forward_path


@pytest.mark.parametrize("emits", [math.nan, math.inf])
def test_a_seed_whose_own_gradients_explode_is_pruned_and_the_host_never_knew(
    emits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bomb, "emits", emits)
    with blueprints.temporarily() as registry:
        registry.register("bomb", family=Family.TRANSFORMER)(make_bomb)
        run, alone = Run("bomb", isolation="shadowing"), Run()
        run.fit()
    alone.fit()
    (pruned,) = run.of(SeedPruned)
    assert (pruned.from_stage, pruned.reason) == (
        SeedStage.TRAINING,
        "its gradients are not finite",
    )
    assert run.losses == alone.losses
    state = alone.host.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.host.state_dict().items())


@pytest.mark.parametrize(
    ("accumulation_steps", "num_bad"),
    [
        pytest.param(1, 7, id="less than half of the steps"),
        pytest.param(4, 4, id="four batches, but one step"),
        pytest.param(4, 8, id="half of the steps, but two"),
    ],
)
def test_few_bad_batches_are_no_reason_to_prune_a_seed(
    accumulation_steps: int, num_bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with blueprints.temporarily() as registry:
        registry.register("bomb", family=Family.TRANSFORMER)(make_bomb)
        run = Run("bomb", isolation="shadowing", accumulation_steps=accumulation_steps)

        def begin() -> None:
            calls = run.trainer.growth.slots["embed"].seed.calls
            monkeypatch.setattr(Bomb, "bad", range(calls + 1, calls + 1 + num_bad))

        run.trainer.growth.isolation_monitor.interval_steps = None  # it calls the seed as well
        run.tamper = {2 * STEPS + 1: begin}
        run.fit()
    assert not run.of(SeedPruned)
    counts = [event.nonfinite_steps for event in run.of(GradientHealthMeasured)]
    assert counts == [num_bad // accumulation_steps] * 4


@pytest.mark.parametrize("by_step", [False, True])
def test_a_seed_is_not_blamed_for_what_is_bad_without_it_too_or_only_in_the_step(
    by_step: bool,
) -> None:
    run = Run("mlp")
    bad = range(45, 48)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = mse_loss(output, target)
        return value * math.nan if run.made in bad and torch.is_grad_enabled() else value

    if by_step:
        run.trainer.training_step.loss = loss
    else:
        run.spoilt = set(bad)
    run.fit()
    (back,) = run.of(RunWentBack)
    assert (back.from_step, back.to_step) == (47, 40)
    assert not run.of(SeedBlamed, SeedPruned)
    assert run.trainer.growth.slots["embed"].in_forward_path


def losses_of(governor: Governor, values: list[float]) -> list[bool]:
    refused = []
    for value in values:
        governor.look(torch.tensor(value))
        skipped = governor.judge()
        refused.append(skipped is not None)
        governor.count(skipped)
    return refused


def test_a_step_that_its_norm_makes_bad_is_none_of_the_good_ones() -> None:
    governor = Governor(GovernorConfig(history_steps=8))
    for norm in (1.0, math.inf, 1.0):
        governor.look(torch.tensor(2.0))
        governor.judge(torch.tensor(norm))
    assert governor.state_dict()["history"] == [2.0, 2.0]


def test_the_band_follows_the_losses() -> None:
    governor = Governor(GovernorConfig(history_steps=8, band_width=10.0))
    falling = [1.0 - 0.05 * k for k in range(10)]
    assert not any(losses_of(governor, falling))
    assert losses_of(governor, [0.6 * 10, 0.6]) == [True, False]
    noisy = Governor(GovernorConfig(history_steps=8, band_width=10.0))
    assert not any(losses_of(noisy, [1.0, 0.1, 2.0, 0.3, 1.5, 0.2, 1.0, 0.5] * 3 + [6.0]))
    constant = Governor(GovernorConfig(history_steps=8, band_width=10.0))
    assert losses_of(constant, [1.0] * 8 + [1.49, 1.51]) == [False] * 9 + [True]
    assert not any(losses_of(Governor(GovernorConfig(band_width=None)), [1.0] * 99 + [1e9]))


@pytest.mark.parametrize("share_above_zero", [0.5, 0.06, 0.005, 0.0])
def test_losses_that_are_mostly_0_make_no_other_loss_bad_but_one_that_explodes(
    share_above_zero: float,
) -> None:
    """As those of hinges and triplets; what is left above 0 varies by orders of magnitude."""
    numbers = random.Random(0)
    governor = Governor()
    above_zero = [numbers.random() < share_above_zero for _ in range(20_000)]
    losses = [3.0 * numbers.random() ** 4 for _ in range(100 + len(above_zero))]
    mostly_0 = [
        loss if above else 0.0 for loss, above in zip(losses[100:], above_zero, strict=True)
    ]
    assert not any(losses_of(governor, [*losses[:100], *mostly_0]))
    assert losses_of(governor, [1e3, 0.0]) == [True, False]


def test_of_what_is_0_from_the_first_step_no_band_is_taken() -> None:
    assert not any(losses_of(Governor(), [0.0] * 200 + [0.3] + [0.0] * 200 + [0.1, 7.0]))


def test_rare_losses_far_above_the_others_carry_the_band_no_further_than_they_reach() -> None:
    """Seven of eight batches are memorised; and a loss that grows step by step is bad in time."""
    rare = Governor()
    assert not any(losses_of(rare, [1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 0.5] * 16))
    assert losses_of(rare, [0.5, 2.0, 0.5]) == [False, True, False]
    steady = [1.0 + 0.05 * math.sin(k) for k in range(128)]
    growing = [1.1**k for k in range(20)]
    refused = losses_of(Governor(), [*steady, *growing])
    assert refused.index(True) < len(steady) + 15
    assert all(refused[refused.index(True) :])


def test_a_run_whose_batches_are_nearly_all_solved_learns_from_the_others() -> None:
    """By hinge loss, with a few wrong labels; nothing explodes."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    features = torch.randn(2048, 2)
    features = 3.0 * features[features[:, 0].abs() > 0.5]
    labels = features[:, 0].sign()
    labels[torch.rand(len(labels)) < 0.004] *= -1.0
    data = list(zip(features.split(16), labels.split(16), strict=True))
    seen: list[float] = []

    def hinge(output: Tensor, target: Tensor) -> Tensor:
        value = torch.relu(1.0 - output.squeeze(1) * target).mean()
        seen.append(float(value.detach()))
        return value

    recorder = Recorder()
    growth = esper.Growth(
        esper.attach(host, ["0"], example=features[:2]),
        torch.optim.Adam(host.parameters(), lr=3e-2),
        policy=esper.PlannedPolicy({}),
        sinks=[recorder],
    )
    config = esper.TrainerConfig(epochs=8)
    reports = esper.Trainer(growth, data, loss=hinge, evaluate=lambda: 1.0, config=config).fit()
    last = seen[-len(data) :]
    assert 0 < sum(loss > 0.0 for loss in last) < 0.2 * len(data)
    assert not recorder.of(StepSkipped, RunWentBack)
    assert reports[-1].train_loss == pytest.approx(sum(last) / len(data))


@pytest.mark.parametrize("over_steps", [0, 5])
def test_a_loss_that_rises_since_a_seed_has_left_is_not_bad(over_steps: int) -> None:
    run = Run("mlp")
    growth = run.trainer.growth
    slot = growth.slots["embed"]
    growth.policy = Script("mlp", Prune(slot="embed", over_steps=over_steps, reason="test"))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        """As if the seed carried nearly all of it."""
        missing = 1.0 - slot.alpha if growth.epoch > 2 else 0.0
        return mse_loss(output, target) * (1.0 + 300.0 * missing)

    run.trainer.training_step.loss = loss
    run.fit()
    assert run.of(SeedPruned)
    assert not run.of(StepSkipped, RunWentBack)


def test_a_snapshot_of_spoilt_weights_is_never_gone_back_to() -> None:
    """They are spoilt in the very step after which it is taken."""
    run = Run()
    optimizer = run.trainer.growth.slots.binding.optimizer
    steps = itertools.count(1)

    def spoil(*_: Any) -> None:
        if next(steps) in (40, 45):
            with torch.no_grad():
                run.host.head.weight.mul_(1e6)

    optimizer.register_step_post_hook(spoil)
    run.fit()
    assert [event.to_step for event in run.of(RunWentBack)] == [30, 30]
    assert run.losses[max(run.losses)] < 10.0
    assert run.trainer._safeguard._candidate is None, "two copies are held for one step only"


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY])
def test_of_two_seeds_the_one_that_came_last_is_left_out(
    stage: SeedStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that is committed and one that is on trial."""
    monkeypatch.setattr(Bomb, "emits", 1e7)
    run = Run(slot=["embed", "dropout"])
    slots = run.trainer.growth.slots

    def grow(path: str, blueprint: str, until: SeedStage) -> None:
        slots[path].germinate(blueprint)
        while slots[path].stage is not until:
            slots[path].advance(force=True)
        if until is SeedStage.BLENDING:
            slots[path].set_alpha_target(1.0, 0)

    with blueprints.temporarily() as registry:
        registry.register("bomb", family=Family.TRANSFORMER)(make_bomb)
        grow("dropout", "mlp", SeedStage.FOSSILIZED)
        grow("embed", "mlp", SeedStage.PROBATIONARY)
        run.tamper = {20: lambda: grow("dropout", "bomb", stage)}
        run.fit()
    (event,) = run.of(SeedBlamed)
    assert event.slot == "dropout"
    assert event.loss_without < 10.0
    assert slots["embed"].stage is SeedStage.PROBATIONARY
    assert not run.of(RunWentBack)
