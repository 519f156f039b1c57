"""A deep copy of a grown model is a model of its own, which runs but does not grow."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import SeedStage, SlotConfig, SlotSet
from esper.lifecycle.learning import Isolation
from esper.slots import SeedSlot, find_slots
from esper.training.carried_state import CarriedState
from esper.training.state_tree import tree_from_tensor

STAGES = [
    SeedStage.DORMANT,
    SeedStage.GERMINATED,
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.PROBATIONARY,
    SeedStage.FOSSILIZED,
]


def grown(host: Any, stage: SeedStage, grow: Any, randomise: Any) -> tuple[nn.Module, SlotSet]:
    model = host.build()
    slots = esper.attach(
        model,
        host.targets,
        example=host.inputs(),
        config=SlotConfig(isolation=Isolation.SHADOWING),
    )
    slots.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    for slot in slots.values():
        if stage is not SeedStage.DORMANT:
            grow(slot, "with_dropout", stage)
            randomise(slot.branches)
        if stage is SeedStage.BLENDING:
            slot.set_alpha_target(0.5, 0)
    return model, slots


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_computes_the_same_and_is_independent(
    host: Any,
    stage: SeedStage,
    training: bool,
    grow: Any,
    randomise: Any,
    bits_of: Any,
    fingerprint: Any,
    test_blueprints: None,
) -> None:
    model, _ = grown(host, stage, grow, randomise)
    twin, witness = copy.deepcopy(model), copy.deepcopy(model)

    def run(module: nn.Module) -> bytes:
        module.train(training).zero_grad()
        torch.manual_seed(3)
        output = module(host.inputs())
        output.square().sum().backward()
        gradients = [bits_of(p.grad) for p in module.parameters() if p.grad is not None]
        return b"".join([bits_of(output), *gradients])

    assert run(model) == run(twin) == run(witness)
    untouched = fingerprint(model)["state_dict"]
    randomise(twin, seed=9)
    for slot in find_slots(twin):
        slot.blend_alpha.fill_(0.9)
        slot.branches = nn.ModuleList()
        slot.num_inlined = slot.num_committed = 0
    run(twin)
    assert fingerprint(model)["state_dict"] == untouched
    assert run(model) == run(witness)


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_refuses_to_grow_and_stays_as_it_is(
    hosts: Any,
    stage: SeedStage,
    grow: Any,
    randomise: Any,
    fingerprint: Any,
    test_blueprints: None,
) -> None:
    model, _ = grown(hosts["cnn"], stage, grow, randomise)
    twin = copy.deepcopy(model)
    before = fingerprint(twin)
    calls = [lambda slot: slot.state()]
    if stage in (SeedStage.DORMANT, SeedStage.FOSSILIZED):
        calls.append(lambda slot: slot.germinate("norm"))
    else:
        calls.append(lambda slot: slot.advance(force=True))
        calls.append(lambda slot: slot.prune())
        calls.append(lambda slot: slot.prune(over_steps=3))
    if stage is SeedStage.PROBATIONARY:
        calls.append(lambda slot: slot.commit())
    for slot in find_slots(twin):
        for call in calls:
            with pytest.raises(RuntimeError, match=r"copy of the model.*grow the original"):
                call(slot)
        assert slot.stage is stage
    assert fingerprint(twin) == before


def test_a_copy_can_be_detached_and_attached_to_anew(
    hosts: Any, grow: Any, randomise: Any, fingerprint: Any, test_blueprints: None
) -> None:
    host = hosts["cnn"]
    model, slots = grown(host, SeedStage.TRAINING, grow, randomise)
    original = fingerprint(model)
    twin = copy.deepcopy(model)
    esper.detach(twin)
    assert list(twin.state_dict()) == list(host.build().state_dict())
    assert not find_slots(twin)
    assert not any(module._forward_hooks for module in twin.modules())
    anew = esper.attach(twin, host.targets, example=host.inputs())
    grow(anew[host.targets[0]], "norm", SeedStage.PROBATIONARY)
    assert fingerprint(model) == original
    assert all(isinstance(slot, SeedSlot) and slot.owner is slots for slot in find_slots(model))


def test_what_carries_a_copys_growth_leaves_the_originals_alone(hosts: Any) -> None:
    model = hosts["mlp"].build()
    CarriedState(model, state=lambda: {"of": "original"}, load=lambda _: None)
    twin = copy.deepcopy(model)
    assert "esper_growth" not in twin.state_dict()
    CarriedState(twin, state=lambda: {"of": "twin"}, load=lambda _: None)
    for module, name in ((model, "original"), (twin, "twin")):
        assert tree_from_tensor(module.state_dict()["esper_growth"])["growth"] == {"of": name}
        assert len(module._state_dict_hooks) == 1


def test_a_detached_slot_says_that_it_cannot_grow(hosts: Any) -> None:
    host = hosts["mlp"]
    model = host.build()
    slots = esper.attach(model, host.targets, example=host.inputs())
    esper.detach(model)
    for slot in slots.values():
        with pytest.raises(RuntimeError, match="was detached"):
            slot.germinate("norm")
