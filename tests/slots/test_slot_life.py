"""The life of a slot: stages, gates, ramps, prunes, failures, what is left at the end."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import esper
from esper import SeedSlot, SeedStage, SlotConfig, SlotSet
from esper.lifecycle.events import (
    AlphaTargetReached,
    Event,
    GateEvaluated,
    Priority,
    SeedFailed,
    SeedPruned,
    SeedRescaled,
    SlotReset,
    StageChanged,
)
from esper.lifecycle.learning import Isolation
from esper.lifecycle.stages import GROWTH_PATH, RECOVERY_PATH, IllegalTransition
from esper.seeds import Family, Seed, blueprints
from esper.seeds.cnn import NormSeed
from esper.slots import GerminationError
from esper.slots.breaker import BreakerState, CircuitBreaker

Grow = Callable[..., list[Event]]


class Bench:
    """A host with one slot and an optimizer."""

    def __init__(self, case: Any, **config: Any) -> None:
        self.case = case
        self.model = case.build()
        self.slots: SlotSet = esper.attach(
            self.model,
            case.targets[0],
            example=case.inputs(),
            config=SlotConfig(**{"isolation": Isolation.SHADOWING, **config}),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.slots.bind(self.optimizer)
        self.inputs = case.inputs()

    @property
    def slot(self) -> SeedSlot:
        return self.slots[self.case.targets[0]]

    def step(self) -> list[Event]:
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.slots.tick()

    def output(self) -> Tensor:
        torch.manual_seed(0)
        return self.model(self.inputs).detach()


@pytest.fixture
def bench(hosts: Any) -> Callable[..., Bench]:
    return lambda name="cnn", **config: Bench(hosts[name], **config)


def stages(events: list[Event]) -> list[SeedStage]:
    return [event.to_stage for event in events if isinstance(event, StageChanged)]


def gates(events: list[Event]) -> list[GateEvaluated]:
    return [event for event in events if isinstance(event, GateEvaluated)]


def test_force_walks_the_whole_growth_path_and_every_gate_is_on_record(
    bench: Callable[..., Bench], grow: Grow
) -> None:
    b = bench()
    events = grow(b.slot, "conv_light", SeedStage.FOSSILIZED)
    assert tuple(stages(events)) == GROWTH_PATH[1:]
    verdicts = {gate.result.gate: gate.result for gate in gates(events)}
    assert [verdicts[name].passed for name in ("G0", "G1")] == [True, True]
    for name in ("G2", "G3", "G4", "G5"):
        assert verdicts[name].forced
        assert not verdicts[name].passed
    assert b.slot.committed[0].blueprint == "conv_light"
    assert b.slot.committed[0].param_count == sum(p.numel() for p in b.slot.branches.parameters())


def test_seeds_that_meet_every_gate_are_not_forced(bench: Callable[..., Bench]) -> None:
    b = bench()
    slot = b.slot
    events = [*slot.germinate("conv_light"), *slot.advance()]
    for _ in range(40):
        b.step()
    measured = slot.measurements
    measured.gradient_ratio, measured.line_search_gain_fraction = 1.0, 0.1
    measured.loss_increase_fraction, measured.contribution_fraction = 0.0, 0.1
    measured.step_time_ratio, measured.trial_contributions = 1.0, [0.1, 0.1]
    measured.linear_share, measured.over_linear_fraction = 0.5, 0.1
    measured.trial_over_linear = [0.1, 0.1]
    events += [*slot.advance(), *slot.set_alpha_target(1.0, 10)]
    for _ in range(30):
        b.step()
    for _ in range(3):
        events += slot.advance()
    assert tuple(stages(events)) == GROWTH_PATH[1:]
    assert not any(gate.result.forced for gate in gates(events))


def test_a_refusal_leaves_the_stage_and_says_why(
    bench: Callable[..., Bench], fingerprint: Any
) -> None:
    b = bench()
    b.slot.germinate("conv_light")
    b.slot.advance()
    before = fingerprint(b.model)
    for refusals in (1, 2):
        (event,) = b.slot.advance()
        assert isinstance(event, GateEvaluated)
        assert b.slot.stage is SeedStage.TRAINING
        assert b.slot.state().refusals_in_stage == refusals
    assert "training_steps 0 >= 40 FAILS" in str(event.result)
    assert "gradient_ratio not measured" in str(event.result)
    assert fingerprint(b.model) == before


def test_a_broken_seed_is_refused_at_birth(bench: Callable[..., Bench], fingerprint: Any) -> None:
    class Loud(NormSeed):
        def increment(self, features: Tensor) -> Tensor:
            return super().increment(features) + 1e-3

    b = bench()
    before = fingerprint(b.model)
    with blueprints.temporarily() as registry:

        @registry.register("loud", family=Family.CNN)
        def _loud(dim: int) -> Seed:
            return Loud(dim)

        with pytest.raises(GerminationError, match=r"G0 refused: identity_error 0\.001") as caught:
            b.slot.germinate("loud")
    assert gates(caught.value.events)
    assert b.slot.stage is SeedStage.DORMANT
    assert fingerprint(b.model) == before


def test_a_build_that_keeps_failing_opens_the_breaker(
    bench: Callable[..., Bench], fingerprint: Any
) -> None:
    b, now, built = bench(), [0.0], []
    breaker = CircuitBreaker("build x", max_failures=2, cooldown_seconds=9, clock=lambda: now[0])
    b.slots._breakers["faulty"] = breaker
    before = fingerprint(b.model)
    with blueprints.temporarily() as registry:

        @registry.register("faulty", family=Family.CNN)
        def _faulty(dim: int) -> Seed:
            torch.rand(3)
            built.append(dim)
            raise ArithmeticError("planted")

        messages = []
        for seconds in (0, 1, 2, 12):
            now[0] = seconds
            with pytest.raises(GerminationError) as caught:
                b.slot.germinate("faulty")
            messages.append(str(caught.value))
            if seconds == 1:
                assert caught.value.events[0].priority is Priority.WARNING
    assert len(built) == 3
    assert "ArithmeticError: planted" in messages[0]
    assert "failed 2 times in a row; it will be tried again 9 s" in messages[2]
    assert breaker.state is BreakerState.OPEN
    assert fingerprint(b.model) == before


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_the_embargo_is_counted_in_epochs(bench: Callable[..., Bench], epochs: int) -> None:
    b = bench(embargo_epochs=epochs)
    b.slot.germinate("norm")
    b.slot.prune()
    assert stages(b.slots.end_epoch()) == [SeedStage.EMBARGOED]
    if epochs:
        told = rf"^slot 'norm' is EMBARGOED for {epochs} more epochs; advance\(force=True\) ends"
        with pytest.raises(IllegalTransition, match=told):
            b.slot.advance()
        with pytest.raises(IllegalTransition, match="from EMBARGOED to GERMINATED"):
            b.slot.germinate("norm")
    for _ in range(epochs - 1):
        assert stages(b.slots.end_epoch()) == []
    events = b.slots.end_epoch()
    assert stages(events) == [SeedStage.RESETTING, SeedStage.DORMANT]
    (reset,) = (event for event in events if isinstance(event, SlotReset))
    assert reset.leftovers == ()
    assert reset.priority is Priority.NORMAL
    b.slot.germinate("norm")


def test_advance_takes_the_recovery_path_one_stage_at_a_time(
    bench: Callable[..., Bench], advance_to: Any
) -> None:
    b = bench()
    b.slot.germinate("norm")
    events = [*b.slot.prune(), *advance_to(b.slot, SeedStage.DORMANT)]
    assert tuple(stages(events)) == RECOVERY_PATH


def leave_in_the_model(b: Bench, parameter: Any) -> Callable[[], None]:
    b.model.register_parameter("leftover", parameter)
    return lambda: delattr(b.model, "leftover")


def leave_in_a_group(b: Bench, parameter: Any) -> Callable[[], None]:
    held = b.optimizer.param_groups[0]["params"]
    held.append(parameter)
    return held.pop


def leave_in_the_state(b: Bench, parameter: Any) -> Callable[[], None]:
    b.optimizer.state[parameter] = {"momentum_buffer": parameter.detach()}
    return lambda: b.optimizer.state.pop(parameter)


def leave_norms(b: Bench, parameter: Any) -> Callable[[], None]:
    owner = f"seed of slot {b.slot.path!r}"
    b.slots.gradient_health.note_before_clipping({owner: parameter.norm()})
    return lambda: b.slots.gradient_health.forget(owner)


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        (leave_in_the_model, "parameters in the model"),
        (leave_in_a_group, "parameters or state in the optimizer"),
        (leave_in_the_state, "parameters or state in the optimizer"),
        (leave_norms, "gradient norms"),
    ],
)
def test_a_leftover_is_critical_and_keeps_the_slot_resetting(
    bench: Callable[..., Bench], leave: Any, named: str
) -> None:
    b = bench(embargo_epochs=1)
    b.slot.germinate("norm")
    parameter = next(b.slot.seed.parameters())
    b.slot.prune()
    take_away = leave(b, parameter)
    b.slots.end_epoch()
    for _ in range(2):
        (reset,) = (e for e in b.slots.end_epoch() if isinstance(e, SlotReset))
        assert reset.leftovers == (named,)
        assert reset.priority is Priority.CRITICAL
        assert b.slot.stage is SeedStage.RESETTING
    take_away()
    assert stages(b.slots.end_epoch()) == [SeedStage.DORMANT]


def test_a_slot_grows_behind_what_it_committed_until_its_cap(
    bench: Callable[..., Bench], grow: Grow, randomise: Any
) -> None:
    b = bench(max_committed=2)
    first, second = "norm", "conv_light"
    grow(b.slot, first, SeedStage.FOSSILIZED)
    randomise(b.slot.branches)
    assert stages(b.slots.end_epoch()) == []
    committed = b.output()

    b.slot.germinate(second)
    assert torch.equal(b.output(), committed)
    for stage in GROWTH_PATH[2:6]:
        b.slot.advance(force=True)
        assert b.slot.stage is stage
        assert torch.equal(b.output(), committed)
    randomise(b.slot.living)
    on_trial = b.output()
    assert not torch.equal(on_trial, committed)
    b.slot.commit()
    assert torch.equal(b.output(), on_trial)

    assert [seed.blueprint for seed in b.slot.committed] == [first, second]
    with pytest.raises(IllegalTransition, match="legal from FOSSILIZED: TERMINATED"):
        b.slot.germinate(first)
    assert stages(b.slots.end_epoch()) == [SeedStage.TERMINATED]
    with pytest.raises(IllegalTransition, match="TERMINATED to GERMINATED"):
        b.slot.germinate(first)
    assert torch.equal(b.output(), on_trial)


def test_a_pruned_successor_leaves_what_was_committed(
    bench: Callable[..., Bench], grow: Grow, randomise: Any
) -> None:
    b = bench()
    grow(b.slot, "norm", SeedStage.FOSSILIZED)
    randomise(b.slot.branches)
    committed = b.output()
    b.slot.germinate("conv_light")
    b.slot.advance(force=True)
    b.slot.prune()
    assert torch.equal(b.output(), committed)
    assert len(b.slot.branches) == 1


def test_seeds_of_one_slot_start_from_different_weights_and_the_same_in_every_run(
    bench: Callable[..., Bench], advance_to: Any
) -> None:
    runs = []
    for _ in range(2):
        b, weights = bench(embargo_epochs=0), []
        for _ in range(2):
            b.slot.germinate("conv_light")
            weights.append(b.slot.seed.convolutions[0].weight.detach().clone())
            b.slot.prune()
            advance_to(b.slot, SeedStage.DORMANT)
        runs.append(weights)
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])


@pytest.mark.parametrize(
    "stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY]
)
def test_a_seed_that_raises_is_pruned_and_training_goes_on(
    hosts: Any, stage: SeedStage, grow: Grow, test_blueprints: None
) -> None:
    b = Bench(hosts["cnn"])
    grow(b.slot, "raises", stage, after=6)
    if stage is SeedStage.BLENDING:
        b.slot.set_alpha_target(0.5, 0)
    for calls in range(b.slot.seed.calls, 6):
        assert b.slot.seed.calls == calls
        assert not any(isinstance(event, SeedFailed) for event in b.step())
    seed = list(b.slot.seed.parameters())
    host = {name: tensor for name, tensor in b.model.state_dict().items() if "slot" not in name}
    plain = hosts["cnn"].build()
    plain.load_state_dict(host)
    torch.manual_seed(0)
    expected = plain(b.inputs).detach()
    structure = b.slots.structure()
    assert torch.equal(b.output(), expected)
    assert b.slots.structure() != structure, "the rest of this step runs without the seed"

    events = b.slots.tick()
    assert [type(event) for event in events] == [SeedFailed, SeedPruned, StageChanged]
    assert events[0].priority is Priority.CRITICAL
    assert "ArithmeticError: planted failure" in events[0].error
    assert b.slot.stage is SeedStage.PRUNED
    assert set(seed).isdisjoint(b.optimizer.state)
    for _ in range(3):
        assert b.step() == []


def test_a_seed_that_has_raised_is_not_committed_and_its_failure_dies_with_it(
    hosts: Any, grow: Grow, test_blueprints: None
) -> None:
    b = Bench(hosts["cnn"], embargo_epochs=0)
    grow(b.slot, "raises", SeedStage.PROBATIONARY, after=2)
    b.output()
    events = b.slot.commit()
    assert [type(event) for event in events] == [SeedFailed, SeedPruned, StageChanged]
    assert b.slot.committed == []
    b.slots.end_epoch()
    b.slots.end_epoch()
    grow(b.slot, "norm", SeedStage.TRAINING)
    assert b.step() == []
    assert b.slot.stage is SeedStage.TRAINING


def test_a_seed_behind_the_host_is_not_run_in_eval_mode(
    hosts: Any, grow: Grow, test_blueprints: None
) -> None:
    b = Bench(hosts["cnn"])
    grow(b.slot, "raises", SeedStage.TRAINING)
    b.model.eval()
    calls = b.slot.seed.calls
    b.output()
    assert b.slot.seed.calls == calls
    b.model.train()
    b.output()
    assert b.slot.seed.calls == calls + 1


def test_a_committed_seed_that_raises_is_the_hosts_own_error(
    hosts: Any, grow: Grow, test_blueprints: None
) -> None:
    b = Bench(hosts["cnn"])
    grow(b.slot, "raises", SeedStage.FOSSILIZED, after=2)
    with pytest.raises(ArithmeticError):
        b.output()


def test_live_insertion_enters_at_alpha_one_without_a_change(hosts: Any, grow: Grow) -> None:
    b = Bench(hosts["tokens"], isolation=Isolation.NONE)
    slot, plain = b.slot, b.output()
    b.model.zero_grad()
    events = [*slot.germinate("mlp"), *slot.advance(), *slot.advance()]
    events += slot.set_alpha_target(1.0, 0)
    assert all(gate.result.passed for gate in gates(events))
    assert slot.alpha == 1.0
    assert slot.stage is SeedStage.BLENDING
    assert slot.state().live
    assert torch.equal(b.output(), plain)
    assert not slot.isolated
    seed = [parameter.detach().clone() for parameter in slot.seed.parameters()]
    for _ in range(20):
        b.step()
    assert not any(torch.equal(a, p) for a, p in zip(seed, slot.seed.parameters(), strict=True))
    slot.measurements.loss_increase_fraction = 0.0
    assert slot.advance()[-1].to_stage is SeedStage.SHADOWING


def test_a_ramp_moves_the_buffer_in_place_and_arrives_exactly(
    bench: Callable[..., Bench], grow: Grow
) -> None:
    b = bench()
    grow(b.slot, "norm", SeedStage.BLENDING)
    buffer = b.slot.blend_alpha
    b.slot.set_alpha_target(0.75, 5, curve="linear")
    seen, events = [b.slot.alpha], []
    for _ in range(7):
        events += b.slots.tick()
        seen.append(b.slot.alpha)
        assert float(buffer) == pytest.approx(b.slot.alpha)
    assert seen == pytest.approx([0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.75, 0.75])
    assert [type(event) for event in events] == [AlphaTargetReached]
    assert b.slot.blend_alpha is buffer


def test_shadowing_is_at_full_alpha_however_it_was_entered(
    bench: Callable[..., Bench], grow: Grow
) -> None:
    b = bench()
    grow(b.slot, "norm", SeedStage.BLENDING)
    b.slot.set_alpha_target(1.0, 0)
    b.slot.set_alpha_target(0.5, 4)
    b.slot.advance(force=True)
    for _ in range(5):
        b.slots.tick()
    assert b.slot.alpha == 1.0
    assert float(b.slot.blend_alpha) == 1.0


def test_entering_the_blend_scales_the_seed_to_its_best_amplitude(
    bench: Callable[..., Bench], grow: Grow, randomise: Any
) -> None:
    b = bench()
    grow(b.slot, "conv_light", SeedStage.TRAINING)
    randomise(b.slot.living)
    features = torch.randn(2, b.slot.dim, 4, 4)
    increment = b.slot.seed.increment(features)
    b.slot.measurements.best_amplitude = 0.5
    events = b.slot.advance(force=True)
    assert [event.factor for event in events if isinstance(event, SeedRescaled)] == [0.5]
    torch.testing.assert_close(b.slot.seed.increment(features), 0.5 * increment)


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY])
def test_a_fade_out_goes_down_to_zero_and_then_removes(
    bench: Callable[..., Bench], stage: SeedStage, grow: Grow
) -> None:
    b = bench()
    plain = b.output()
    grow(b.slot, "norm", stage)
    if stage is SeedStage.BLENDING:
        b.slot.set_alpha_target(1.0, 10)
        b.slots.tick()
        b.slots.tick()
    before = b.slot.alpha
    events = b.slot.prune(over_steps=4, reason="no use")
    left = [SeedStage.BLENDING] if stage is SeedStage.PROBATIONARY else []
    assert stages(events) == left
    with pytest.raises(IllegalTransition, match=r"\) is fading out and cannot advance$"):
        b.slot.advance(force=True)
    with pytest.raises(IllegalTransition, match=r"\) is fading out; its alpha cannot be set$"):
        b.slot.set_alpha_target(1.0, 3)
    alphas, events = [before], []
    for _ in range(4):
        assert b.slot.seed is not None
        events += b.slots.tick()
        alphas.append(b.slot.alpha)
    assert b.slot.seed is None
    assert alphas == sorted(alphas, reverse=True)
    assert [type(event) for event in events] == [AlphaTargetReached, SeedPruned, StageChanged]
    assert events[1].reason == "no use"
    b.model.load_state_dict(b.case.build().state_dict())
    assert torch.equal(b.output(), plain)


@pytest.mark.parametrize("stage", [SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING])
def test_a_seed_without_weight_in_the_forward_has_nothing_to_fade(
    bench: Callable[..., Bench], stage: SeedStage, grow: Grow
) -> None:
    b = bench()
    grow(b.slot, "norm", stage)
    b.slot.prune(over_steps=100)
    assert b.slot.stage is SeedStage.PRUNED


def test_nothing_of_a_pruned_seed_is_kept_in_memory(
    hosts: Any, grow: Grow, test_blueprints: None
) -> None:
    b = Bench(hosts["cnn"])
    grow(b.slot, "with_dropout", SeedStage.TRAINING)
    b.step()
    kept = [weakref.ref(b.slot.seed), *(weakref.ref(p) for p in b.slot.living.parameters())]
    b.slot.prune()
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


@pytest.mark.parametrize("stage", GROWTH_PATH[1:])
def test_nothing_of_a_model_that_is_dropped_is_kept_in_memory(
    hosts: Any, grow: Grow, stage: SeedStage
) -> None:
    b = Bench(hosts["cnn"])
    grow(b.slot, "norm", stage)
    b.step()
    kept = [weakref.ref(b.model), weakref.ref(b.slot), weakref.ref(b.optimizer)]
    kept += [weakref.ref(parameter) for parameter in b.model.parameters()]
    del b
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_a_device_move_takes_the_count_of_nonfinite_gradients_along(
    hosts: Any, grow: Grow, test_blueprints: None
) -> None:
    b = Bench(hosts["mlp"])
    grow(b.slot, "nan_gradient", SeedStage.TRAINING)
    b.model._apply(lambda tensor: tensor.clone())
    b.step()
    assert int(b.slot.nonfinite_steps) > 0


def test_a_seed_in_a_host_of_another_dtype_takes_that_dtype(hosts: Any, grow: Grow) -> None:
    case = hosts["mlp"]
    model, inputs = case.build().double(), case.inputs().double()
    slots = esper.attach(model, case.targets, example=inputs)
    slot = slots[case.targets[0]]
    grow(slot, "mlp", SeedStage.BLENDING, blend_operator="gate")
    assert {p.dtype for p in slot.living.parameters()} == {torch.float64}
    assert model(inputs).dtype is torch.float64


def test_a_seed_in_a_part_in_eval_mode_counts_no_training(
    bench: Callable[..., Bench], grow: Grow
) -> None:
    b = bench()
    grow(b.slot, "conv_light", SeedStage.TRAINING)
    b.model.get_submodule(b.slot.path).eval()
    for _ in range(3):
        b.step()
    assert b.slot.measurements.training_steps == 0
    b.model.train()
    b.step()
    assert b.slot.measurements.training_steps == 1


@pytest.mark.parametrize("restored", [False, True])
def test_what_is_attached_and_germinated_in_inference_mode_learns(
    hosts: Any, grow: Grow, restored: bool
) -> None:
    b = Bench(hosts["tokens"])
    esper.detach(b.model)
    with torch.inference_mode():
        b.slots = esper.attach(b.model, b.case.targets[0], example=b.inputs)
        b.slots.bind(b.optimizer)
        foreseen = b.slot.foreseen("mlp").seed
        assert not any(parameter.is_inference() for parameter in foreseen.parameters())
        grow(b.slot, "block", SeedStage.TRAINING, source="own")
        if restored:
            state = b.slots.state_dict()
            b.slot.prune()
            b.slots.load_state_dict(state)
    before = [parameter.clone() for parameter in b.slot.seed.parameters()]
    b.step()
    b.step()
    moved = [not torch.equal(p, q) for p, q in zip(b.slot.seed.parameters(), before, strict=True)]
    assert any(moved)
    b.slot.advance(force=True)
    b.slot.set_alpha_target(0.5, 2)
    b.step()
    assert float(b.slot.blend_alpha) == pytest.approx(b.slot.alpha) == pytest.approx(0.25)


@pytest.mark.parametrize("stage", [SeedStage.PRUNED, SeedStage.DORMANT, SeedStage.FOSSILIZED])
def test_what_happened_without_an_optimizer_is_made_up_for_when_one_is_bound(
    bench: Callable[..., Bench], grow: Grow, advance_to: Any, stage: SeedStage
) -> None:
    b = bench()
    b.slot.germinate("conv_light")
    advance_to(b.slot, SeedStage.TRAINING)
    b.step()
    seed = list(b.slot.seed.parameters())
    b.slots.unbind()
    if stage is not SeedStage.FOSSILIZED:
        b.slot.prune()
    advance_to(b.slot, stage)
    b.slots.bind(b.optimizer)
    host, own = (group["params"] for group in b.optimizer.param_groups)
    assert own == []
    kept = stage is SeedStage.FOSSILIZED
    assert [any(p is q for q in host) for p in seed] == [kept] * len(seed)
    assert [p in b.optimizer.state for p in seed] == [kept] * len(seed)
    if not kept:
        advance_to(b.slot, SeedStage.DORMANT)


def test_a_seed_that_went_before_the_first_bind_leaves_the_optimizer(
    hosts: Any, advance_to: Any
) -> None:
    case = hosts["mlp"]
    model = case.build()
    slots = esper.attach(model, "first", example=case.inputs())
    slots["first"].germinate("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slots["first"].prune()
    slots.bind(optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    advance_to(slots["first"], SeedStage.DORMANT)
