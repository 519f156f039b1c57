"""Callers' mistakes: each a clear error that names the object and the remedy, with no effect."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.gates import GateThresholds
from esper.lifecycle.learning import Isolation
from esper.lifecycle.stages import IllegalTransition
from esper.seeds import BlueprintError, Family, Seed, blueprints
from esper.seeds.noop import NoopSeed
from esper.slots import OwnershipError
from esper.slots.placement import SLOT_NAME

X = torch.randn(4, 6)


class Returns(nn.Module):
    """A host whose module `odd` returns what it is told to."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.odd = Function(output)

    def forward(self, inputs: Tensor) -> Any:
        return self.odd(self.layer(inputs))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor) -> Any:
        return self.function(features)


class Repeats(nn.Module):
    """Runs one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.layer(inputs))


class Shares(nn.Module):
    """Has one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs)


class Loops(nn.Module):
    """A container of its own that runs whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Tanh()

    def forward(self, inputs: Tensor) -> Tensor:
        for child in self.children():
            inputs = child(inputs)
        return inputs


class LoopingSequential(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        for child in self:
            inputs = child(inputs)
        return inputs


class LoopingList(nn.ModuleList):
    """A ModuleList with a forward of its own."""

    forward = LoopingSequential.forward


def lists() -> nn.Module:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.ModuleList([nn.Linear(6, 6)])
            self.named = nn.ModuleDict({"a": nn.Linear(6, 6)})
            self.empty = nn.Sequential()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.empty(self.named["a"](self.items[0](inputs)))

    return Lists()


class Makes(nn.Module):
    """Makes what it lacks in its first forward."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.body, self.make, self.head = nn.Linear(6, 3), make, None
        self.register_parameter("scale", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.make(self)
        return self.body(inputs)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def ends_as_it_has_begun() -> nn.Module:
    activation = nn.Tanh()
    layers = nn.Linear(6, 8), activation, nn.Linear(8, 8), activation
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(8, 3))


def attach_first(model: nn.Module) -> Any:
    return esper.attach(model, "0", example=X)


ATTACH: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "unknown path": (
        lists,
        {"targets": "item.0"},
        ValueError,
        r"Lists has no module 'item\.0'; did you mean"
        r" 'items\.0'",
    ),
    "unknown pattern": (
        chain,
        {"targets": ["0", "layer.*"]},
        ValueError,
        r"Sequential has no module 'layer\.\*'; its modules: 0, 1, 2",
    ),
    "target that is no path": (
        chain,
        {"targets": [0]},
        TypeError,
        "named_modules.* has them, got int 0",
    ),
    "no target": (chain, {"targets": []}, ValueError, "at least one target path"),
    "the model itself": (chain, {"targets": ""}, ValueError, "has no module ''"),
    "example of another shape": (
        chain,
        {"example": torch.randn(4, 5)},
        ValueError,
        r"Sequential cannot run on the example \(\(4, 5\) torch\.float32\).*one batch",
    ),
    "example of another dtype": (
        chain,
        {"example": torch.ones(4, 6, dtype=torch.long)},
        ValueError,
        r"torch\.int64.*batch",
    ),
    "example that is no batch": (chain, {"example": 3}, TypeError, "must be a tensor.*got int"),
    "example that is a string": (chain, {"example": "x"}, TypeError, "must be a tensor.*got str"),
    "empty example": (chain, {"example": ()}, TypeError, "must be a tensor.*got tuple"),
    "example with other keys": (
        chain,
        {"example": {"pixels": X}},
        TypeError,
        r"no key of the example \(pixels\) is a parameter of Sequential\.forward \(input\)",
    ),
    "output that is a mapping": (
        lambda: Returns(lambda h: {"features": h}),
        {"targets": "odd"},
        TypeError,
        "module 'odd' returned <class 'dict'>; a slot needs a floating-point tensor",
    ),
    "output that is nothing": (
        lambda: Returns(lambda _: None),
        {"targets": "odd"},
        TypeError,
        "'odd' returned.*NoneType",
    ),
    "output of integers": (
        lambda: Returns(lambda h: h.argmax(-1)),
        {"targets": "odd"},
        TypeError,
        r"'odd' returned a tensor of torch\.int64; .*choose a module inside it",
    ),
    "output that is sparse": (
        lambda: Returns(lambda h: h.to_sparse()),
        {"targets": "odd"},
        TypeError,
        r"'odd' returned a tensor of layout torch\.sparse_coo",
    ),
    "output that is an empty tuple": (
        lambda: Returns(lambda _: ()),
        {"targets": "odd"},
        TypeError,
        "'odd' returned.*tuple",
    ),
    "features of one dimension": (
        lambda: Returns(lambda h: h.sum(-1)),
        {"targets": "odd"},
        ValueError,
        r"'odd' returned features of shape \(4,\); slots take B C H W, B T D or B D",
    ),
    "features of five dimensions": (
        lambda: Returns(lambda h: h.reshape(4, 2, 2, 2, 1)),
        {"targets": "odd"},
        ValueError,
        r"shape \(4, 2, 2, 2, 1\); slots take .*family=",
    ),
    "family that does not fit": (
        chain,
        {"family": "cnn"},
        ValueError,
        r"'0' returned.*CNN family takes B C H W",
    ),
    "unknown family": (
        chain,
        {"family": "vision"},
        ValueError,
        "unknown family 'vision'; known: cnn, transf",
    ),
    "module that runs twice": (
        Repeats,
        {"targets": "layer"},
        ValueError,
        r"'layer' ran 2 times.*name a module that is",
    ),
    "module that does not run": (
        Repeats,
        {"targets": "idle"},
        ValueError,
        "'idle' did not run on the example",
    ),
    "module under two names": (
        Shares,
        {"targets": "first"},
        ValueError,
        r"'first' stands at several places \(first, second\).*name a module that is used once",
    ),
    "second name of a module": (
        Shares,
        {"targets": "second"},
        ValueError,
        r"'second' stands at several places \(first, second\)",
    ),
    "both names of a module": (
        Shares,
        {"targets": "*"},
        ValueError,
        r"'first' stands at several places \(first, second\)",
    ),
    "chain that ends in a module that it has used before": (
        ends_as_it_has_begun,
        {},
        ValueError,
        r"'0' ends in a module that stands at several places \(0\.1, 0\.3\).*of its own, as nn\.Id",
    ),
    "child made in the forward": (
        lambda: nn.Sequential(Makes(lambda m: setattr(m, "head", nn.Linear(3, 3)))),
        {"targets": "0.body"},
        ValueError,
        r"^module '0' \(Makes\) made 'head' in its forward, .*run the model once before esper\.att",
    ),
    "parameter made in train mode": (
        lambda: Makes(lambda m: m.training and setattr(m, "scale", nn.Parameter(torch.ones(3)))),
        {"targets": "body"},
        ValueError,
        r"^the model \(Makes\) made 'scale' in its forward, ",
    ),
    "two targets that are one": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)),
        {"targets": ["0", "0.1"]},
        ValueError,
        "'0' and '0.1' are one module.*name only one",
    ),
    "ModuleList": (
        lists,
        {"targets": "items"},
        TypeError,
        r"'items' is a ModuleList.*\('items\.\*'\)",
    ),
    "ModuleDict": (
        lists,
        {"targets": "named"},
        TypeError,
        r"'named' is a ModuleDict.*\('named\.\*'\)",
    ),
    "empty Sequential": (lists, {"targets": "empty"}, TypeError, "'empty' is an empty Sequential"),
    "container that loops over its children": (
        lambda: nn.Sequential(Loops(), nn.Linear(6, 3)),
        {"targets": "0"},
        ValueError,
        "'0' runs all its children itself.*name its last child",
    ),
    "Sequential with its own loop": (
        lambda: nn.Sequential(LoopingSequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)),
        {"targets": "0"},
        ValueError,
        "'0' runs all its children itself.*name its last child",
    ),
    "ModuleList with its own loop": (
        lambda: nn.Sequential(LoopingList([nn.Linear(6, 6), nn.Tanh()]), nn.Linear(6, 3)),
        {"targets": "0"},
        ValueError,
        "'0' runs all its children itself.*name its last child",
    ),
    "config for an unknown path": (
        chain,
        {"config": {"1": SlotConfig()}},
        ValueError,
        "config names '1', .*slots: '0'",
    ),
    "config that is none": (
        chain,
        {"config": {"0": {"warmup_steps": 3}}},
        TypeError,
        "config of slot '0' must be a SlotConfig, got dict",
    ),
    "config of another kind": (
        chain,
        {"config": 3},
        TypeError,
        "config must be a SlotConfig, or a mapping.*got int",
    ),
}


@pytest.mark.parametrize("mistake", ATTACH)
def test_a_refused_attach_names_the_mistake_and_leaves_the_model(
    mistake: str, fingerprint: Any
) -> None:
    build, arguments, error, message = ATTACH[mistake]
    model = build()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        esper.attach(model, **{"targets": "0", "example": X, **arguments})
    assert fingerprint(model) == before


def test_a_model_without_memory_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^Sequential is on the meta device, .*build it .* or .*\.to_empty\(device=",
    ):
        esper.attach(chain().to("meta"), "0", example=X)


@pytest.mark.parametrize("verb", ["attach", "detach", "bake"])
def test_slots_where_a_model_is_wanted_are_named(verb: str) -> None:
    slots = esper.attach(chain(), "0", example=X)
    arguments = {"targets": "0", "example": X} if verb == "attach" else {}
    with pytest.raises(TypeError, match=rf"esper\.{verb} takes the model, .* got SlotSet"):
        getattr(esper, verb)(slots, **arguments)


@pytest.mark.parametrize("targets", ["0", "1", ["0", "2"]])
def test_a_second_attach_is_refused(targets: Any, fingerprint: Any) -> None:
    model = chain()
    esper.attach(model, "0", example=X)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'0' already has a slot; give all targets in one call"):
        esper.attach(model, targets, example=X)
    assert fingerprint(model) == before


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_inside(model: nn.Module) -> nn.Module:
    model[1] = torch.compile(model[1])
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "torch.compile": (torch.compile, "the model is compiled"),
    "module.compile": (compiled_in_place, "the model is compiled"),
    "a compiled part": (compiled_inside, "module '1' of the model is compiled"),
    "DataParallel": (nn.DataParallel, "the model is wrapped in DataParallel"),
    "DDP": (nn.parallel.DistributedDataParallel, "is wrapped in DistributedDataParallel"),
    "a part in DDP": (
        lambda model: nn.Sequential(nn.parallel.DistributedDataParallel(model)),
        "module '0' of the model is wrapped in DistributedDataParallel",
    ),
    "FSDP": (sharded, "the model is sharded by FSDP"),
    "TorchScript": (lambda model: torch.jit.trace(model, X), "the model is a ScriptModule"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_wrapped_models_are_refused_with_the_right_order(
    wrapper: str, verb: str, fingerprint: Any, process_group: None
) -> None:
    wrap, message = WRAPPERS[wrapper]
    model = chain()
    if verb == "detach" and wrapper != "TorchScript":
        esper.attach(model, "0", example=X)
    wrapped = wrap(model)
    before = fingerprint(model)
    call = esper.detach if verb == "detach" else attach_first
    with pytest.raises(RuntimeError, match=rf"cannot {verb}: .*{message}.*esper\.attach.*then"):
        call(wrapped)
    assert fingerprint(model) == before


def test_detaching_refuses_what_it_would_lose(fingerprint: Any, grow: Any) -> None:
    with pytest.raises(ValueError, match="Sequential has no slots to detach"):
        esper.detach(chain())
    model = chain()
    slots = esper.attach(model, ["0", "1"], example=X)
    grow(slots["0"], "norm", SeedStage.FOSSILIZED)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"slots '0' hold committed seeds.*esper\.bake"):
        esper.detach(model)
    assert fingerprint(model) == before


class Slotted:
    """A host with slots in every stage that a mistake may be made in."""

    STAGES = (
        SeedStage.DORMANT,
        SeedStage.TRAINING,
        SeedStage.BLENDING,
        SeedStage.PROBATIONARY,
        SeedStage.FOSSILIZED,
    )

    def __init__(self, grow: Callable[..., None]) -> None:
        layers = [nn.Linear(6, 6) for _ in self.STAGES]
        self.model = nn.Sequential(*layers, nn.Conv2d(1, 4, 1))
        self.model.forward = self._run
        self.model.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.float64)))
        config = SlotConfig(isolation=Isolation.SHADOWING, max_committed=1)
        paths = [str(index) for index in range(len(self.STAGES) + 1)]
        self.slots = esper.attach(self.model, paths, example=X, config=config)
        for path, stage in zip(paths, self.STAGES, strict=False):
            if stage is not SeedStage.DORMANT:
                grow(self.slots[path], "norm", stage)
        self.maps = self.slots[paths[-1]]
        self.slots["2"].set_alpha_target(0.5, 10)

    def _run(self, inputs: Tensor) -> Tensor:
        for layer in self.model[:-1]:
            inputs = layer(inputs)
        return self.model[-1](inputs[:, None, :, None])

    def __getitem__(self, stage: SeedStage) -> esper.SeedSlot:
        return self.slots[str(self.STAGES.index(stage))]


D, T, B, P, F = Slotted.STAGES

GROWTH: dict[str, tuple[Callable[[Slotted], Any], type[Exception], str]] = {
    "unknown blueprint": (
        lambda s: s[D].germinate("mpl"),
        BlueprintError,
        "no blueprint 'mpl' in family transformer: did you mean 'mlp'",
    ),
    "blueprint of the other family": (
        lambda s: s[D].germinate("conv_light"),
        BlueprintError,
        "no blueprint 'conv_light' in family transformer.*registered: ",
    ),
    "unknown option": (
        lambda s: s[D].germinate("lora", ranks=3),
        BlueprintError,
        "'lora'.*no option 'ranks'; did you mean 'rank'",
    ),
    "option that no event can hold": (
        lambda s: s[D].germinate("lora", rank=np.int64(4)),
        ValidationError,
        r"options\.rank",
    ),
    "refused option": (lambda s: s[D].germinate("lora", rank=0), ValueError, "rank must be at le"),
    "refused option of a map": (
        lambda s: s.maps.germinate("conv_light", kernel_size=2),
        ValueError,
        "kernel_size must be",
    ),
    "unknown operator": (
        lambda s: s[D].germinate("mlp", blend_operator="lerp"),
        ValueError,
        "unknown blend operator 'lerp'; known: add, multiply, gate",
    ),
    "factory that returns no seed": (
        lambda s: s[D].germinate("no_seed"),
        BlueprintError,
        "must return an esper.seeds.Seed",
    ),
    "a second living seed": (
        lambda s: s[T].germinate("mlp"),
        IllegalTransition,
        r"slot '1' \(seed 'norm'\) cannot go from TRAINING to GERMINATED; legal from TRAINING: ",
    ),
    "germination beyond the cap": (
        lambda s: s[F].germinate("mlp"),
        IllegalTransition,
        "legal from FOSSILIZED: TERMINATED",
    ),
    "the host's parameter in a seed": (
        lambda s: s[D].germinate("steals_weight"),
        OwnershipError,
        r"seed of slot '0' shares its parameter 'seed\.stolen' with host; give it its own copy",
    ),
    "the host's parameter of another dtype in a seed": (
        lambda s: s[D].germinate("steals_scale"),
        OwnershipError,
        r"'seed\.stolen' with host",
    ),
    "another seed's parameter in a seed": (
        lambda s: s[D].germinate("steals_seed"),
        OwnershipError,
        r"'seed\.stolen' with seed of slot '1'",
    ),
    "a committed seed's parameter in a seed": (
        lambda s: s[D].germinate("steals_committed"),
        OwnershipError,
        r"'seed\.stolen' with host",
    ),
    "advance without a seed": (
        lambda s: s[D].advance(),
        IllegalTransition,
        r"^slot '0' is DORMANT and needs germinate\(blueprint\), not advance\(\)$",
    ),
    "advance beyond the end": (
        lambda s: s[F].advance(force=True),
        IllegalTransition,
        "legal from FOSSILIZED",
    ),
    "commit before the trial": (
        lambda s: s[T].commit(),
        IllegalTransition,
        "from TRAINING to FOSSILIZED; legal from",
    ),
    "prune without a seed": (
        lambda s: s[D].prune(),
        IllegalTransition,
        "slot '0' cannot go from DORMANT to PRUNED",
    ),
    "prune of a committed seed": (
        lambda s: s[F].prune(),
        IllegalTransition,
        "from FOSSILIZED to PRUNED",
    ),
    "prune over a negative time": (
        lambda s: s[B].prune(over_steps=-1),
        ValueError,
        "over_steps must not be negative, got -1",
    ),
    "prune over half a step": (
        lambda s: s[P].prune(over_steps=2.5),
        TypeError,
        "'float' object cannot be interpreted as an integer",
    ),
    "alpha before the blend": (
        lambda s: s[T].set_alpha_target(1.0, 5),
        IllegalTransition,
        r"^slot '1' \(seed 'norm'\) is TRAINING; alpha can be set only in BLENDING$",
    ),
    "alpha on trial": (
        lambda s: s[P].set_alpha_target(0.5, 5),
        IllegalTransition,
        "only in BLENDING",
    ),
    "retarget in the middle of a ramp": (
        lambda s: s[B].set_alpha_target(1.0, 5),
        ValueError,
        "alpha is on its way up from 0 to 0.5, 0 of 10 steps done, and takes no other target",
    ),
    "unknown curve": (
        lambda s: s[B].set_alpha_target(1.0, 5, curve="bezier"),
        ValueError,
        "unknown curve 'bezier'; known: linear, cosine, sigmoid",
    ),
    "curve of one's own": (
        lambda s: s[B].set_alpha_target(1.0, 5, curve=lambda done: done**3),
        ValueError,
        r"for another one call set_alpha_target\(alpha, steps=0\) after each step",
    ),
    "unknown slot": (
        lambda s: s.slots["9"],
        KeyError,
        r"no slot at '9'; slots: '0', '1', '2', '3', '4', '5'",
    ),
    "teacher that is part of the host": (
        lambda s: s.slots.ledger.add_teacher("t", s.model[0]),
        OwnershipError,
        "with host",
    ),
}


@pytest.fixture
def thieves() -> Iterator[Callable[[Slotted], None]]:
    """Register blueprints that keep parameters of others."""

    class Thief(NoopSeed):
        def __init__(self, stolen: nn.Parameter) -> None:
            super().__init__()
            self.stolen = stolen

    def prepare(slotted: Slotted) -> None:
        loot = {
            "steals_weight": slotted.model[0].weight,
            "steals_scale": slotted.model.scale,
            "steals_seed": next(slotted[T].seed.parameters()),
            "steals_committed": next(slotted[F].branches.parameters()),
        }
        for name, parameter in loot.items():

            @blueprints.register(name, family=Family.TRANSFORMER)
            def _thief(dim: int, *, _loot: Any = parameter) -> Seed:
                return Thief(_loot)

        @blueprints.register("no_seed", family=Family.TRANSFORMER)
        def _no_seed(dim: int) -> Any:
            return nn.Identity()

    with blueprints.temporarily():
        yield prepare


@pytest.mark.parametrize("mistake", GROWTH)
def test_a_refused_call_names_the_mistake_and_leaves_the_model(
    mistake: str, fingerprint: Any, grow: Any, thieves: Callable[[Slotted], None]
) -> None:
    call, error, message = GROWTH[mistake]
    slotted = Slotted(grow)
    optimizer = torch.optim.SGD(slotted.model.parameters(), lr=0.1)
    slotted.slots.bind(optimizer)
    thieves(slotted)
    before = fingerprint(slotted.model)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    stages = [slot.stage for slot in slotted.slots.values()]
    with pytest.raises(error, match=message):
        call(slotted)
    assert fingerprint(slotted.model) == before
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert [slot.stage for slot in slotted.slots.values()] == stages


def test_advance_tells_where_a_slot_can_grow_again(grow: Any) -> None:
    slot = attach_first(chain())["0"]
    grow(slot, "norm", SeedStage.FOSSILIZED)
    with pytest.raises(IllegalTransition, match=r"is FOSSILIZED and needs germinate\(blueprint\)"):
        slot.advance()


@pytest.mark.parametrize("keeps_slot", [False, True])
def test_nothing_germinates_behind_a_module_that_was_replaced(
    *, keeps_slot: bool, fingerprint: Any
) -> None:
    """With the slot as a child, but no hook, as `convert_sync_batchnorm` makes it."""
    model = chain()
    slot = esper.attach(model, "0", example=X)["0"]
    other = copy.deepcopy(model[0])
    if keeps_slot:
        other._forward_hooks.clear()
        setattr(other, SLOT_NAME, slot)
    else:
        esper.detach(other)
    model[0] = other
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"no more.*change the model first, then attach"):
        slot.germinate("mlp")
    assert fingerprint(model) == before
    assert slot.stage is SeedStage.DORMANT


@pytest.mark.parametrize(
    ("target", "steps", "message"),
    [
        (1.5, 5, r"must lie in \[0, 1\], got 1\.5"),
        (-0.1, 5, r"must lie in \[0, 1\]"),
        (math.nan, 5, r"must lie in \[0, 1\], got nan"),
        (math.inf, 5, r"must lie in \[0, 1\], got inf"),
        (0.5, -1, "steps must not be negative, got -1"),
        (0.0, 5, "already stands at 0; there is nothing to ramp"),
    ],
)
def test_a_bad_alpha_target_changes_nothing(
    target: float, steps: int, message: str, grow: Any
) -> None:
    model = chain()
    slot = esper.attach(model, "0", example=X)["0"]
    grow(slot, "norm", SeedStage.BLENDING)
    before = slot.snapshot()
    with pytest.raises(ValueError, match=message):
        slot.set_alpha_target(target, steps)
    assert slot.snapshot() == before
    assert float(slot.blend_alpha) == 0.0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: GateThresholds(min_gradient_ratio=math.nan), "min_gradient_ratio"),
        (lambda: GateThresholds(max_step_time_ratio=math.inf), "max_step_time_ratio"),
        (lambda: GateThresholds(min_contribution_fraction=-math.inf), "min_contribution_fraction"),
        (lambda: SlotConfig(learning_rate_multiplier=math.nan), "learning_rate_multiplier"),
        (lambda: SlotConfig(learning_rate_multiplier=0.0), "learning_rate_multiplier"),
        (lambda: SlotConfig(trust_fraction=math.inf), "trust_fraction"),
        (lambda: SlotConfig(warmup_steps=-1), "warmup_steps"),
        (lambda: SlotConfig(max_committed=0), "max_committed"),
        (lambda: SlotConfig(ramp_curve="bezier"), "ramp_curve"),
        (lambda: SlotConfig(warm_up_steps=3), "warm_up_steps"),
        (lambda: SlotConfig(objective="shadow"), "objective=shadow .*isolation='shadowing'"),
        (lambda: SlotConfig(trust_fraction=0.3), r"trust_fraction=0\.3 .*isolation='shadowing'"),
    ],
)
def test_settings_out_of_range_or_unknown_are_refused_by_name(
    make: Callable[[], Any], field: str
) -> None:
    with pytest.raises(ValidationError, match=field):
        make()
