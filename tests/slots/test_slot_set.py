"""What the slots of a model share: which blueprints fit where, and the cache of that."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedStage
from esper.lifecycle.events import CachesSwept
from esper.seeds import Family, Seed, blueprints
from esper.seeds.noop import NoopSeed
from esper.seeds.transformer import MLPSeed


def test_living_slots_are_those_with_a_living_seed(hosts: Any, grow: Any) -> None:
    case = hosts["mlp"]
    slots = esper.attach(case.build(), case.targets, example=case.inputs())
    first, second = slots.values()
    assert slots.living_slots == ()
    second.germinate("mlp")
    assert slots.living_slots == (second,)
    grow(first, "mlp", SeedStage.PROBATIONARY)
    assert slots.living_slots == (first, second)
    first.commit()
    assert slots.living_slots == (second,)
    kept = slots.state_dict()
    second.prune()
    assert slots.living_slots == ()
    slots.load_state_dict(kept)
    assert slots.living_slots == (second,)


def test_structure_changes_with_what_a_step_runs_and_with_nothing_else(
    hosts: Any, advance_to: Any
) -> None:
    case = hosts["mlp"]
    model, inputs = case.build(), case.inputs()
    config = esper.SlotConfig(isolation="training")
    slots = esper.attach(model, case.targets, example=inputs, config=config)
    slot, other = slots.values()
    other.germinate("mlp")  # commits and prunes must tell also where another seed lives on
    seen: list[Any] = []

    def has_changed() -> bool:
        structure = slots.structure()
        assert slots.structure() == structure, "to ask changes nothing"
        seen.append(structure)
        return structure not in seen[:-1]

    assert has_changed()
    slot.germinate("mlp")
    assert has_changed()
    for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING):
        before = slot.kind
        advance_to(slot, stage)
        assert has_changed() == (slot.kind != before)
        if stage is SeedStage.BLENDING:
            slot.set_alpha_target(1.0, 0)
        model(inputs)
        slots.tick()
        with slot.left_out(), slot.cast_shadow(), slot.sit_out():
            assert not has_changed()
    advance_to(slot, SeedStage.PROBATIONARY)
    assert has_changed()
    slot.commit()
    assert has_changed()
    other.prune()
    assert has_changed()
    kept = slots.state_dict()
    slots.load_state_dict(kept)
    assert has_changed()


def test_choices_are_what_fits_by_cost_and_follow_the_registry(hosts: Any, advance_to: Any) -> None:
    case = hosts["tokens"]
    model = case.build()
    slots = esper.attach(model, case.targets, example=case.inputs())
    slot = slots[case.targets[0]]

    class TooWide(MLPSeed):
        def increment(self, features: Tensor) -> Tensor:
            return super().increment(features[..., :5])

    class WrongShape(MLPSeed):
        def increment(self, features: Tensor) -> Tensor:
            return super().increment(features)[:, :1]

    before = slot.state().choices
    names = set(blueprints.names(Family.TRANSFORMER))
    assert {choice.name for choice in before} == names
    counts = [choice.param_count for choice in before]
    assert counts == sorted(counts)
    for choice in before:
        slot.germinate(choice.name)
        assert sum(p.numel() for p in slot.living.parameters()) == choice.param_count
        slot.prune()
        advance_to(slot, SeedStage.DORMANT)
    with blueprints.temporarily() as registry:

        @registry.register("too_wide", family=Family.TRANSFORMER)
        def _too_wide(dim: int) -> Seed:
            return TooWide(dim, dim, checkpointing=False)

        @registry.register("wrong_shape", family=Family.TRANSFORMER)
        def _wrong_shape(dim: int) -> Seed:
            return WrongShape(dim, dim, checkpointing=False)

        @registry.register("wide", family=Family.TRANSFORMER)
        def _wide(dim: int) -> Seed:
            return MLPSeed(dim, 9 * dim, checkpointing=False)

        assert {choice.name for choice in slot.state().choices} == names | {"wide"}
        registry.unregister(Family.TRANSFORMER, "mlp")
        registry.register("mlp", family=Family.TRANSFORMER)(_wide)
        redefined = {choice.name: choice.param_count for choice in slot.state().choices}
        assert redefined["mlp"] == redefined["wide"] > max(counts)
    assert slot.state().choices == before


def test_an_epochs_end_sweeps_the_caches_and_reports_them(hosts: Any) -> None:
    case = hosts["mlp"]
    slots = esper.attach(case.build(), case.targets, example=case.inputs())
    for _ in range(2):
        for slot in slots.values():
            slot.state()
    *_, swept = slots.end_epoch()
    assert isinstance(swept, CachesSwept)
    probes = len(slots) * len(blueprints.names(Family.TRANSFORMER))
    assert {"shape_probes", "block_masks"} == set(swept.sizes)
    for statistics in (swept.sizes, swept.misses, swept.hits):
        assert statistics["shape_probes"] == probes


def test_asking_what_fits_builds_nothing_in_memory_and_draws_nothing(monkeypatch: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4096))
    slots = esper.attach(model, "0", example=torch.zeros(2, 4))
    before = torch.get_rng_state()
    devices: set[str] = set()
    make = nn.Linear.reset_parameters

    def watch(layer: nn.Linear) -> None:
        devices.add(layer.weight.device.type)
        make(layer)

    monkeypatch.setattr(nn.Linear, "reset_parameters", watch)
    with blueprints.temporarily():
        assert slots["0"].state().choices
    assert devices == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_slot_set_is_a_mapping_that_tells_its_stages() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    slots = esper.attach(model, ["1", "0"], example=torch.zeros(2, 4))
    assert list(slots) == ["0", "1"]
    assert len(slots) == 2
    slots["1"].germinate("norm")
    assert repr(slots) == "SlotSet({'0': DORMANT, '1': GERMINATED})"


def test_the_hosts_parameters_follow_every_seed(hosts: Any, grow: Any) -> None:
    case = hosts["mlp"]
    model = case.build()
    slots = esper.attach(model, case.targets, example=case.inputs())
    first, second = slots.values()

    def host() -> set[nn.Parameter]:
        found = slots.host_parameters()
        assert found == [p for p in model.parameters() if p in set(found)]
        return set(found)

    own = host()
    assert own == set(model.parameters())
    grow(first, "mlp", SeedStage.PROBATIONARY)
    assert host() == own
    first.commit()
    committed = set(first.branches.parameters())
    assert host() == own | committed
    second.germinate("lora")
    assert host() == own | committed
    second.prune()
    assert host() == own | committed


@pytest.mark.parametrize("what", ["factory", "increment"])
def test_a_blueprint_that_raises_is_no_choice_and_hides_no_other(what: str) -> None:
    class NoTensor(NoopSeed):
        def increment(self, features: Tensor) -> Any:
            return None

    model = nn.Sequential(nn.Linear(4, 4))
    slots = esper.attach(model, "0", example=torch.zeros(2, 4))
    with blueprints.temporarily() as registry:
        before = slots["0"].state().choices

        @registry.register("broken", family=Family.TRANSFORMER)
        def _broken(dim: int) -> Seed:
            return {}["missing"] if what == "factory" else NoTensor()

        with pytest.warns(RuntimeWarning, match="'broken' is offered to no slot like this one"):
            assert slots["0"].state().choices == before
        assert slots["0"].state().choices == before, "and is told once"
        assert before
