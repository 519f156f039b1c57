"""One process of several: which gradients of seeds are averaged, and in which steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import esper
from esper import SeedStage, SlotConfig, SlotSet
from esper.slots import replication

STAGES_THAT_RUN = (
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.SHADOWING,
    SeedStage.PROBATIONARY,
)
X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def averaged(process_group: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what was averaged, one after the other."""
    sizes: list[int] = []
    reduce = dist.all_reduce

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_floating_point():
            sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", watched)
    return sizes


def bound(**config: Any) -> tuple[SlotSet, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    slots = esper.attach(model, "0", example=X, config=SlotConfig(**config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    slots.bind(optimizer)
    return slots, optimizer


def step(slots: SlotSet, optimizer: torch.optim.Optimizer, *, refused: bool = False) -> None:
    optimizer.zero_grad()
    slots.shadow_pass(lambda: slots.model(X).square().mean())
    slots.model(X).square().mean().backward()
    slots.average_gradients()
    if not refused:
        optimizer.step()
    slots.tick()


def test_gradients_are_averaged_once_in_a_step_that_follows_a_refused_one(
    averaged: list[int], grow: Any
) -> None:
    slots, optimizer = bound()
    slots.replicate()
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    for times, refused in enumerate([False, True, True, False, False], start=1):
        step(slots, optimizer, refused=refused)
        assert len(averaged) == times


@pytest.mark.parametrize(
    "calls", ["average clip step", "clip step", "step", "average clip", "average", "clip"]
)
def test_gradients_are_averaged_once_in_every_step_whoever_asks_and_if_nobody_ends_it(
    calls: str, averaged: list[int], grow: Any
) -> None:
    slots, optimizer = bound()
    slots.replicate()
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    asks = {
        "average": slots.average_gradients,
        "clip": lambda: slots.clip_grad_norm_(1.0),
        "step": optimizer.step,
    }
    for times in (1, 2, 3):
        optimizer.zero_grad()
        slots.model(X).square().mean().backward()
        for call in calls.split():
            asks[call]()
        assert len(averaged) == times


def test_gradients_are_averaged_in_a_step_after_a_state_was_loaded(
    averaged: list[int], grow: Any
) -> None:
    slots, optimizer = bound()
    slots.replicate()
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    kept = slots.state_dict()
    slots.clip_grad_norm_(1.0)  # in a step that is given up
    slots.load_state_dict(kept)
    optimizer.step()
    assert len(averaged) == 2


@pytest.mark.parametrize("how", ["shadowing", "fading"])
def test_a_frozen_seed_stays_put_where_gradients_are_averaged(
    how: str, process_group: None, grow: Any
) -> None:
    slots, optimizer = bound(isolation="shadowing")
    slots.replicate()
    slot = slots["0"]
    grow(slot, "mlp", SeedStage.BLENDING)
    slot.set_alpha_target(0.5, 0)
    for _ in range(3):
        step(slots, optimizer)
    if how == "shadowing":
        slot.advance(force=True)
    else:
        slot.prune(over_steps=100)
    before = [parameter.detach().clone() for parameter in slot.living.parameters()]
    for _ in range(3):
        step(slots, optimizer)
    assert slot.frozen
    assert all(map(torch.equal, slot.living.parameters(), before))


def test_a_seed_that_begins_to_learn_in_shadow_is_averaged(averaged: list[int], grow: Any) -> None:
    slots, optimizer = bound(isolation="shadowing", objective="shadow")
    slots.replicate()
    slots["0"].germinate("mlp")
    step(slots, optimizer)
    assert not averaged, "a seed that has only germinated has no gradient"
    slots["0"].advance(force=True)
    step(slots, optimizer)
    numbers = slots["0"].living.param_count
    told = len(list(slots["0"].living.parameters())) + 1
    assert averaged == [numbers + told]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [SeedStage.GERMINATED, *STAGES_THAT_RUN, SeedStage.FOSSILIZED])
@pytest.mark.parametrize("operator", ["add", "gate"])
def test_the_device_is_asked_who_has_a_gradient_only_where_one_is_lacking(
    stage: SeedStage, operator: str, monkeypatch: pytest.MonkeyPatch, grow: Any
) -> None:
    asked: list[torch.Tensor] = []
    read = replication._read
    monkeypatch.setattr(replication, "_read", lambda told: (asked.append(told), read(told))[1])
    slots, optimizer = bound(isolation="shadowing", blend_operator=operator)
    slots.replicate()
    grow(slots["0"], "mlp", stage)
    for _ in range(2):
        step(slots, optimizer)
    assert not asked
    optimizer.zero_grad()
    slots.average_gradients()  # of a step in which the slot's module has not run
    without = (SeedStage.GERMINATED, SeedStage.SHADOWING)  # has no gradient anyway
    assert len(asked) == (stage not in without)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("how", ["prune", "commit"])
def test_what_a_seed_has_raised_is_forgotten_with_its_life(how: str, grow: Any) -> None:
    slots, optimizer = bound()
    slots.replicate()
    slot = slots["0"]
    grow(slot, "mlp", SeedStage.PROBATIONARY)
    slot.note_failure("RuntimeError: of the first one")
    slots.average_gradients()
    getattr(slot, how)()
    while slot.stage not in (SeedStage.DORMANT, SeedStage.FOSSILIZED):
        slot.advance(force=True)
    slots.tick()
    slots.state_dict()  # refuses one with a failure
    grow(slot, "mlp", SeedStage.BLENDING)
    assert not [event for event in slots.tick() if event.type == "seed_failed"]
    step(slots, optimizer)
    assert slot.living is not None


@pytest.mark.usefixtures("process_group")
def test_by_hand_a_seed_is_pruned_for_what_all_processes_know_and_for_nothing_else(
    grow: Any,
) -> None:
    slots, optimizer = bound()
    slots.replicate()
    slot = slots["0"]
    grow(slot, "mlp", SeedStage.BLENDING)
    slot.note_failure("RuntimeError: here")
    slot.advance(force=True)
    assert slot.stage is SeedStage.SHADOWING
    slots.replication.share_failures(slots)
    slot.advance(force=True)
    assert slot.stage is SeedStage.PRUNED
    while slot.stage is not SeedStage.DORMANT:
        slot.advance(force=True)
    grow(slot, "mlp", SeedStage.PROBATIONARY)
    slot.note_failure("RuntimeError: of the next one, here")
    slot.commit()
    assert slot.stage is SeedStage.FOSSILIZED
    step(slots, optimizer)
    slots.state_dict()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("actions", [None, []], ids=["by the policy", "from outside"])
def test_gates_judge_what_the_first_process_has_measured_whoever_decides(
    actions: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, optimizer = bound()
    slots.unbind()
    slots.replicate()
    growth = esper.Growth(slots, optimizer, policy=esper.PlannedPolicy({}))
    sent: list[Any] = []
    monkeypatch.setattr(
        slots.replication, "from_first", lambda value: (sent.append(value), value)[1]
    )
    growth.look(lambda: 1.0)
    sent.clear()
    growth.conclude(actions)
    assert set(sent[0]) == {"0"}, "measurements by slot"
