"""One process of several: which gradients of seeds are averaged, and in which steps."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import esper
from esper import SeedStage, SlotConfig, SlotSet

X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)


class CountingReplication:
    """Stands in for the processes: counts how often gradients are averaged."""

    def __init__(self) -> None:
        self.times = 0

    def average_gradients(self, parameters: Iterable[nn.Parameter], *, structure: Any) -> None:
        self.times += 1


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def test_gradients_are_averaged_once_in_a_step_that_follows_a_refused_one(grow: Any) -> None:
    slots, optimizer = bound()
    slots.replication = replication = CountingReplication()  # type: ignore[assignment]
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    for times, refused in enumerate([False, True, True, False, False], start=1):
        step(slots, optimizer, refused=refused)
        assert replication.times == times


def test_gradients_are_averaged_in_a_step_after_a_state_was_loaded(grow: Any) -> None:
    slots, optimizer = bound()
    slots.replication = replication = CountingReplication()  # type: ignore[assignment]
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    kept = slots.state_dict()
    slots.average_gradients()  # of a step that is given up
    slots.load_state_dict(kept)
    step(slots, optimizer)
    assert replication.times == 2


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


def test_a_seed_that_begins_to_learn_in_shadow_is_averaged(
    process_group: None, monkeypatch: pytest.MonkeyPatch, grow: Any
) -> None:
    slots, optimizer = bound(isolation="shadowing", objective="shadow")
    slots.replicate()
    sizes: list[int] = []
    reduce = dist.all_reduce

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_floating_point():
            sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", watched)
    slots["0"].germinate("mlp")
    step(slots, optimizer)
    assert not sizes, "a seed that has only germinated has no gradient"
    slots["0"].advance(force=True)
    step(slots, optimizer)
    assert sizes == [slots["0"].living.param_count]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("actions", [None, []], ids=["by the policy", "from outside"])
def test_gates_judge_what_the_first_process_has_measured_whoever_decides(
    actions: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, optimizer = bound()
    slots.unbind()
    slots.replicate()
    growth = esper.Growth(slots, optimizer, policy=esper.SchedulePolicy({}))
    sent: list[Any] = []
    monkeypatch.setattr(
        slots.replication, "from_first", lambda value: (sent.append(value), value)[1]
    )
    growth.look(lambda: 1.0)
    sent.clear()
    growth.conclude(actions)
    assert set(sent[0]) == {"0"}, "measurements by slot"
