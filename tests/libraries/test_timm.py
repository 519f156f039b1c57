"""timm models, randomly initialised: grow by pattern, bake, come back from disk."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from growth_cycle import attach, committed, grow, outputs_of
from timm_models import import_timm

HOSTS: dict[str, tuple[str, dict[str, Any], Sequence[str], str]] = {
    "resnet": ("resnet18", {"channels": (8, 16, 32, 32)}, ["layer[23]"], "layer3.1"),
    "convnext": ("convnext_atto", {}, ["stages.2"], "stages.2.blocks.1"),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 3},
        ["blocks.[01]"],
        "blocks.2",
    ),
}


def make(name: str) -> nn.Module:
    architecture, settings, _, _ = HOSTS[name]
    model: nn.Module = import_timm().create_model(architecture, num_classes=5, **settings)
    return model


@pytest.fixture(autouse=True)
def _fixed_random_stream() -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("blueprint", ["norm", "block"])
def test_a_model_grows_bakes_and_comes_back_from_disk(name: str, blueprint: str, tmp_path: Path):
    _, _, targets, _ = HOSTS[name]
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    model = make(name)
    before = outputs_of(model, images)
    slots = attach(model, targets, images)
    for slot in slots.values():
        slot.germinate(blueprint)
        slot.advance(force=True)
        slot.advance(force=True)
        slot.set_alpha_target(1.0, 0)
    assert torch.equal(outputs_of(model, images), before)
    for slot in slots.values():
        slot.prune()
        while slot.stage is not esper.SeedStage.DORMANT:
            slot.advance(force=True)

    losses = grow(slots, images, labels, blueprint)
    assert losses[-1] < losses[0]
    assert committed(slots) == {path: [blueprint] for path in slots}
    grown = outputs_of(model, images)
    plain = esper.bake(model)
    assert torch.equal(outputs_of(plain, images), grown)
    program = torch.export.export(plain, (images,))
    torch.testing.assert_close(program.module()(images), grown)

    esper.save_pretrained(slots, tmp_path / "grown")
    fresh = make(name)
    esper.from_pretrained(fresh, tmp_path / "grown", example=images)
    assert torch.equal(outputs_of(fresh, images), grown)


@pytest.mark.parametrize("name", HOSTS)
def test_a_copy_of_the_hosts_own_block_is_the_identity_and_then_the_block(name: str):
    _, _, targets, source = HOSTS[name]
    images = torch.randn(2, 3, 32, 32)
    model = make(name)
    before = outputs_of(model, images)
    slots = attach(model, targets, images)
    fitting = [path for path in slots if path != "layer2"]
    for path in fitting:
        slots[path].germinate("block", source=source)
        slots[path].advance(force=True)
        slots[path].advance(force=True)
        slots[path].set_alpha_target(1.0, 0)
    assert torch.equal(outputs_of(model, images), before)
    slot = slots[fitting[-1]]
    torch.nn.init.ones_(slot.seed.output_layers[0].weight)
    features = torch.randn(slot.layout.shape).relu()
    with torch.no_grad():
        expected = model.get_submodule(source)(features)
        torch.testing.assert_close(slot.seed.eval()(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passed", [True, False])
def test_a_seed_is_trained_as_its_block_is_under_decay_by_layers_and_timms_schedule(passed: bool):
    model = make("vit")
    timm_optim, timm_scheduler = map(import_module, ("timm.optim", "timm.scheduler"))
    slots = attach(model, ["blocks.*"], torch.randn(2, 3, 32, 32))
    optimizer = timm_optim.create_optimizer_v2(
        model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65
    )

    def schedule() -> Any:
        return timm_scheduler.CosineLRScheduler(optimizer, 10, warmup_t=3, warmup_lr_init=1e-5)

    scheduler = schedule() if passed else None
    slots.bind(optimizer, scheduler)
    scheduler = scheduler or schedule()
    for epoch in range(8):
        scheduler.step(epoch)
        rates = []
        for path in slots:
            matrix = model.get_submodule(path).attn.qkv.weight
            of_block, *others = (
                {**group, "params": [], "slot": path}
                for group in optimizer.param_groups
                if any(p is matrix for p in group["params"]) or group.get("slot") == path
            )
            assert others == [of_block]
            rates.append(of_block["lr"])
        assert of_block["weight_decay"] == 0.05
        assert len(set(rates)) == len(slots)


def test_a_source_of_another_shape_is_refused_and_blames_no_blueprint():
    images = torch.randn(2, 3, 32, 32)
    slots = attach(make("resnet"), ["layer2"], images)
    for _ in range(5):
        with pytest.raises(ValueError, match=r"source='layer3.1' does not map features of shape"):
            slots["layer2"].germinate("block", source="layer3.1")
    with pytest.raises(ValueError, match=r"no such module; did you mean .*'layer3.1'"):
        slots["layer2"].germinate("block", source="layer3.7")
    slots["layer2"].germinate("block")
