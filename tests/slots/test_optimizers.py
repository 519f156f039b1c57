"""A seed's whole life under every optimizer and learning-rate scheduler of torch."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler, swa_utils

import esper
from esper import SeedSlot, SeedStage, SlotConfig, SlotSet
from esper.lifecycle.learning import Isolation
from esper.training import load_optimizer_state, optimizer_state

Parameters = Iterator[nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "ASGD": lambda p: optim.ASGD(p, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, weight_decay=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, weight_decay=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, weight_decay=0.1, initial_accumulator_value=0.5),
    "Adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, centered=True),
    "Rprop": optim.Rprop,
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
}
VARIANTS: dict[str, Callable[[Parameters], Optimizer]] = {
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad fused": lambda p: optim.Adagrad(p, fused=True),
    "SGD fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "SGD foreach": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "Adam with a tensor as learning rate": lambda p: optim.Adam(p, lr=torch.tensor(0.01)),
}
REFUSED = {"LBFGS", "Muon"}
"""Take one parameter group only, or matrices only."""
UNSUITED = {"SparseAdam"}
"""Refuses the hosts of these tests: it takes sparse gradients only."""

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, total_iters=4)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 6),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=7),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.97**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9, 15], gamma=0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.97),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=200),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=200, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.9, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 30)],
        milestones=[4],
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5, gamma=0.9),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=8),
}
LEAVES_NO_MARK = {"ReduceLROnPlateau"}
"""Nothing on the optimizer tells that it exists; with one `min_lr` it follows new groups itself."""


def test_the_tables_name_everything_torch_has() -> None:
    def classes(module: Any, base: type) -> set[str]:
        found = inspect.getmembers(module, inspect.isclass)
        return {name for name, kind in found if issubclass(kind, base) and name[0] != "_"}

    assert classes(optim, Optimizer) == {*OPTIMIZERS, *REFUSED, *UNSUITED, "Optimizer"}
    schedulers = classes(lr_scheduler, lr_scheduler.LRScheduler) - {"LRScheduler"}
    assert schedulers | {"SWALR"} == set(SCHEDULERS)


class Run:
    """A host with one slot in training."""

    def __init__(
        self,
        case: Any,
        make_optimizer: Callable[[Parameters], Optimizer],
        *,
        accumulation: int = 1,
        scaler: bool = False,
        set_to_none: bool = True,
        reloads: bool = False,
        **config: Any,
    ) -> None:
        self.case = case
        self.model = case.build()
        self.path = case.targets[1]
        self.slots: SlotSet = esper.attach(
            self.model,
            self.path,
            example=case.inputs(),
            config=SlotConfig(isolation=Isolation.SHADOWING, embargo_epochs=1, **config),
        )
        self.optimizer = make_optimizer(self.model.parameters())
        self.accumulation = accumulation
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaler)
        self.set_to_none = set_to_none
        self.reloads = reloads
        self.scheduler: Any = None
        self.steps = 0

    @property
    def slot(self) -> SeedSlot:
        return self.slots[self.path]

    def step(self) -> float:
        total = 0.0
        for part in range(self.accumulation):
            index = self.steps * self.accumulation + part
            loss = F.cross_entropy(self.model(self.case.inputs(index)), self.case.labels(index))
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        self.slots.tick()
        self.steps += 1
        if self.reloads:
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(total)
        elif self.scheduler is not None:
            self.scheduler.step()
        return total

    def moved(self, parameters: list[nn.Parameter], steps: int = 3) -> set[bool]:
        """Train some steps, and tell which answers there are to "has this parameter moved?"."""
        before = [parameter.detach().clone() for parameter in parameters]
        for _ in range(steps):
            self.step()
        return {not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)}

    def seed_parameters(self) -> list[nn.Parameter]:
        assert self.slot.living is not None
        return list(self.slot.living.parameters())

    def held(self) -> set[nn.Parameter]:
        in_groups = {p for group in self.optimizer.param_groups for p in group["params"]}
        return in_groups | set(self.optimizer.state)

    def wait_until_dormant(self) -> None:
        for _ in range(4):
            self.slots.end_epoch()
        assert self.slot.stage is SeedStage.DORMANT


def whole_life(run: Run) -> None:
    """Commit a seed, then prune one now, one by fading out, and one from its trial."""
    slot, groups = run.slot, len(run.optimizer.param_groups)
    host = [p for p in run.model.parameters() if p.requires_grad]
    assert run.moved(host) == {True}

    slot.germinate(run.case.blueprint)
    seed = run.seed_parameters()
    assert run.moved(seed) == {False}, "GERMINATED"
    slot.advance(force=True)
    assert run.moved(seed) == {True}, "TRAINING"
    slot.advance(force=True)
    slot.set_alpha_target(1.0, 4)
    assert run.moved(seed) == {True}, "BLENDING"
    slot.advance(force=True)
    assert run.moved(seed) == {False}, "SHADOWING"
    slot.advance(force=True)
    assert run.moved(seed) == {True}, "PROBATIONARY"
    state = {p: copy.copy(run.optimizer.state[p]) for p in seed}
    slot.commit()
    for parameter in seed:
        assert all(
            run.optimizer.state[parameter][key] is value for key, value in state[parameter].items()
        )
    assert run.moved(seed) == {True}, "committed"
    assert len(run.optimizer.param_groups[0]["params"]) == len(host) + len(seed)

    for removal in ("now", "fade", "fade from trial"):
        slot.germinate(run.case.blueprint)
        pruned = run.seed_parameters()
        slot.advance(force=True)
        assert run.moved(pruned) == {True}, "TRAINING again"
        if removal == "now":
            slot.prune()
        else:
            slot.advance(force=True)
            slot.set_alpha_target(0.7, 2)
            assert run.moved(pruned) == {True}, "BLENDING again"
            if removal == "fade from trial":
                slot.advance(force=True)
                slot.advance(force=True)
                assert run.moved(pruned) == {True}, "on trial again"
            slot.prune(over_steps=3)
            assert slot.fading
            assert run.moved(pruned, steps=2) == {False}, "fading"
            run.step()
        assert slot.stage is SeedStage.PRUNED
        assert run.held().isdisjoint(pruned)
        assert all(parameter.grad is None for parameter in pruned)
        assert run.moved(pruned) == {False}, "PRUNED"
        assert run.moved(seed) == {True}, "committed, beside a pruned one"
        run.wait_until_dormant()
    assert run.moved(host) == {True}
    assert len(run.optimizer.param_groups) == groups
    assert run.held() == {*host, *seed}


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *VARIANTS])
def test_a_seed_lives_and_dies_under_every_optimizer(hosts: Any, optimizer: str) -> None:
    run = Run(hosts["mlp"], {**OPTIMIZERS, **VARIANTS}[optimizer])
    run.slots.bind(run.optimizer)
    whole_life(run)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_seed_lives_and_dies_where_the_optimizers_state_is_loaded_anew(
    hosts: Any, optimizer: str
) -> None:
    """Loading replaces every group: a binding that kept one would fill it in vain."""
    run = Run(hosts["mlp"], OPTIMIZERS[optimizer], reloads=True, learning_rate_multiplier=2.0)
    run.slots.bind(run.optimizer)
    whole_life(run)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused", "SGD"])
def test_a_seed_lives_and_dies_with_accumulation_and_scaler(
    hosts: Any, optimizer: str, scaler: bool, set_to_none: bool
) -> None:
    run = Run(
        hosts["cnn"],
        {**OPTIMIZERS, **VARIANTS}[optimizer],
        accumulation=2,
        scaler=scaler,
        set_to_none=set_to_none,
    )
    run.slots.bind(run.optimizer)
    whole_life(run)


def schedule_of(optimizer: Optimizer) -> list[Any]:
    """What a scheduler may change, of the first group."""
    group = optimizer.param_groups[0]
    return [float(group["lr"]), group.get("momentum"), group.get("betas")]


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_seed_lives_and_dies_under_every_scheduler_which_sees_no_difference(
    hosts: Any, scheduler: str, optimizer: str, made: str
) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS[optimizer], learning_rate_multiplier=0.5, warmup_steps=4)
    if made == "before":
        run.scheduler = SCHEDULERS[scheduler](run.optimizer)
        run.slots.bind(run.optimizer, scheduler=run.scheduler)
    else:
        run.slots.bind(run.optimizer)
        run.scheduler = SCHEDULERS[scheduler](run.optimizer)

    if scheduler != "ReduceLROnPlateau":
        assert len(run.scheduler.get_last_lr()) == 2

    plain = OPTIMIZERS[optimizer](run.case.build().parameters())
    alone = SCHEDULERS[scheduler](plain)
    step, differences = run.step, []

    def step_both() -> float:
        loss = step()
        plain.step()
        alone.step(loss) if scheduler == "ReduceLROnPlateau" else alone.step()
        if schedule_of(run.optimizer) != schedule_of(plain):
            differences.append((run.steps, schedule_of(run.optimizer), schedule_of(plain)))
        host, *others = (float(group["lr"]) for group in run.optimizer.param_groups)
        differences.extend((run.steps, host, lr) for lr in others if lr != host)
        assert run.scheduler.get_last_lr() == [alone.get_last_lr()[0]] * 2
        return loss

    run.step = step_both  # type: ignore[method-assign]
    whole_life(run)
    assert not differences


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in LEAVES_NO_MARK])
def test_binding_refuses_a_scheduler_it_was_not_told_of(hosts: Any, scheduler: str) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"])
    SCHEDULERS[scheduler](run.optimizer)
    with pytest.raises(ValueError, match=r"scheduler=.*or make the scheduler after"):
        run.slots.bind(run.optimizer)
    assert len(run.optimizer.param_groups) == 1
    assert run.slots.binding is None


def test_binding_refuses_an_optimizer_of_one_group_only(hosts: Any) -> None:
    run = Run(hosts["mlp"], optim.LBFGS)
    with pytest.raises(TypeError, match=r"LBFGS.*one parameter group"):
        run.slots.bind(run.optimizer)
    assert len(run.optimizer.param_groups) == 1


def test_binding_refuses_an_optimizer_of_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    slots = esper.attach(model, "0", example=torch.randn(2, 4))
    optimizer = optim.Muon(model.parameters())
    with pytest.raises(TypeError, match=r"Muon trains matrices only"):
        slots.bind(optimizer)
    assert len(optimizer.param_groups) == 1


def test_binding_refuses_an_optimizer_that_trains_other_slots() -> None:
    halves = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
    first, second = (esper.attach(half, "0", example=torch.randn(2, 4)) for half in halves)
    optimizer = optim.SGD(halves.parameters(), lr=0.1)
    first.bind(optimizer)
    first["0"].germinate("mlp")
    with pytest.raises(ValueError, match=r"seeds of other slots already.*attach all slots in one"):
        second.bind(optimizer)
    assert optimizer.param_groups[1]["params"] == list(first["0"].living.parameters())
    first["0"].prune()
    first.unbind()
    second.bind(optimizer)


def host_of_parts() -> nn.Module:
    """A stem, a body of a norm, a matrix and an activation, and a frozen head."""
    body = OrderedDict(norm=nn.LayerNorm(8), expand=nn.Linear(8, 8), act=nn.Tanh())
    head = nn.Linear(8, 2).requires_grad_(requires_grad=False)
    parts = OrderedDict(stem=nn.Linear(4, 8), act=nn.Tanh(), body=nn.Sequential(body), head=head)
    return nn.Sequential(parts)


NO_DECAY, STEM, BODY = range(3)
OWN_GROUP = {
    "stem": STEM,
    "body": BODY,
    "body.norm": NO_DECAY,
    "body.expand": BODY,
    "act": BODY,  # and the head: nothing of their own, and most of the model is there
    "head": BODY,
}


def optimizer_of_parts(model: nn.Module) -> Optimizer:
    """As timm and transformers make it: by weight decay, and by layers."""
    weights = {
        name: [parameter]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1
    }
    others = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [
        {"params": others, "lr": 0.1, "weight_decay": 0.0},
        {"params": weights["stem.weight"], "lr": 0.02, "lr_scale": 0.2},
        {"params": weights["body.expand.weight"], "lr": 0.05, "lr_scale": 0.5},
    ]
    for number, group in enumerate(groups):
        group["name"] = f"group {number}"
    return optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.3)


def bound_parts(paths: list[str], **config: Any) -> tuple[SlotSet, Optimizer]:
    model = host_of_parts()
    slots = esper.attach(model, paths, example=torch.randn(2, 4), config=SlotConfig(**config))
    optimizer = optimizer_of_parts(model)
    slots.bind(optimizer)
    return slots, optimizer


@pytest.mark.parametrize("path", OWN_GROUP)
def test_a_slots_group_is_like_the_one_that_trains_most_of_what_it_stands_behind(
    path: str, grow: Any
) -> None:
    slots, optimizer = bound_parts([path])
    wanted, own = optimizer.param_groups[OWN_GROUP[path]], optimizer.param_groups[3]
    apart = {"params": [], "slot": path, "name": path}
    assert own == {**wanted, **apart}
    grow(slots[path], "mlp", SeedStage.FOSSILIZED)
    seed = list(slots[path].branch(0).parameters())
    assert all(any(p is held for held in wanted["params"]) for p in seed)
    assert own == {**wanted, **apart}


def test_committed_seeds_change_nothing_about_which_group_a_slot_is_like(grow: Any) -> None:
    """Not even a large one inside of what the slot stands behind, and none after resuming."""
    paths = ["body", "body.norm"]
    slots, optimizer = bound_parts(paths)
    grow(slots["body.norm"], "mlp", SeedStage.FOSSILIZED)
    slots.unbind()
    slots.bind(optimizer)
    grow(slots["body"], "mlp", SeedStage.FOSSILIZED)
    own = [list(slots[path].branch(0).parameters()) for path in paths]

    def groups_of(seeds: list[list[nn.Parameter]], among: Optimizer) -> list[list[int]]:
        return [
            [n for n, g in enumerate(among.param_groups) if not set(seed).isdisjoint(g["params"])]
            for seed in seeds
        ]

    assert groups_of(own, optimizer) == [[BODY], [NO_DECAY]]
    kept, kept_optimizer = slots.state_dict(), optimizer_state(optimizer, slots.model)
    again, resumed = bound_parts(paths)
    again.load_state_dict(kept)
    seeds = [list(again[path].branch(0).parameters()) for path in paths]
    assert groups_of(seeds, resumed) == [[BODY], [NO_DECAY]], "before the optimizer has its state"
    load_optimizer_state(resumed, again.model, kept_optimizer)
    assert groups_of(seeds, resumed) == [[BODY], [NO_DECAY]]


PER_GROUP: dict[str, Callable[[Optimizer], Any]] = {
    **SCHEDULERS,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(
        o, [lambda step, rate=rate: rate**step for rate in (0.9, 0.8, 0.7)]
    ),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(
        o, [lambda step, rate=rate: rate for rate in (0.9, 0.8, 0.7)]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.2, 0.1], total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, [0.01, 0.02, 0.03], [0.3, 0.2, 0.1], base_momentum=[0.7, 0.8, 0.9], step_size_up=3
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=1, min_lr=[0.01, 0.006, 0.02]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, [0.01, 0.02, 0.03], anneal_epochs=4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), PER_GROUP["LambdaLR"](o)]
    ),
}
"""As `SCHEDULERS`, with values for each of three groups where the scheduler takes them."""


@pytest.mark.parametrize("scheduler", PER_GROUP)
def test_a_slots_group_follows_a_schedule_as_the_hosts_group_does_that_it_is_like(
    scheduler: str,
) -> None:
    model = host_of_parts()
    paths = list(OWN_GROUP)
    slots = esper.attach(model, paths, example=torch.randn(2, 4))
    optimizer = optimizer_of_parts(model)
    schedule = PER_GROUP[scheduler](optimizer)
    slots.bind(optimizer, schedule)
    groups = optimizer.param_groups
    for _ in range(12):
        for group in groups[3:]:
            wanted = groups[OWN_GROUP[group["slot"]]]
            assert (group["lr"], group["momentum"]) == (wanted["lr"], wanted["momentum"])
        optimizer.step()
        schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
    assert len({group["lr"] for group in groups[:3]}) > 1


@pytest.mark.parametrize(
    "held", [lambda model, seeds: seeds, lambda model, seeds: [{"params": []}, {"params": []}]]
)
def test_seeds_learn_though_no_parameter_of_a_frozen_host_is_in_the_optimizer(
    held: Any, grow: Any
) -> None:
    model = host_of_parts().requires_grad_(requires_grad=False)
    slots = esper.attach(model, "body", example=torch.randn(2, 4))
    host = list(model.parameters())
    grow(slots["body"], "lora", SeedStage.TRAINING)
    slots["body"].advance(force=True)
    slots["body"].set_alpha_target(1.0, 0)
    seed = list(slots["body"].living.parameters())
    optimizer = optim.SGD(held(model, seed), lr=0.1)
    slots.bind(optimizer)
    before = [parameter.detach().clone() for parameter in [*host, *seed]]
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
        slots.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        slots.tick()
    moved = [not torch.equal(old, new) for old, new in zip(before, [*host, *seed], strict=True)]
    assert moved == [False] * len(host) + [True] * len(seed)
    reading = slots.read_gradient_health(slots["body"])
    assert reading is not None
    assert (reading.host_norm, reading.ratio) == (0.0, None)


def test_what_is_clipped_as_the_hosts_follows_a_new_head() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    slots = esper.attach(model, "0", example=torch.randn(2, 4))
    slots.bind(optim.SGD(model.parameters(), lr=0.1))
    slots.clip_grad_norm_(1.0)
    model[1] = nn.Linear(4, 3)
    slots.unbind()
    slots.bind(optim.SGD(model.parameters(), lr=0.1))
    (1e4 * model(torch.randn(2, 4))).sum().backward()
    slots.clip_grad_norm_(1.0)
    assert model[1].weight.grad.norm() <= 1.0


def test_what_another_optimizer_trains_is_clipped_with_the_host_and_is_no_part_of_its_health(
    grow: Any,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    slots = esper.attach(model, "0", example=torch.randn(2, 4))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    extra = nn.Parameter(torch.ones(3))
    optim.SGD([*matrices, extra], lr=0.1)
    bound = optim.SGD(biases, lr=0.1)
    slots.bind(bound)
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    (1e3 * model(torch.randn(8, 4)).square().mean() + 1e3 * extra.sum()).backward()
    every = [*matrices, *biases, extra]
    whole, own = (nn.utils.get_total_norm([p.grad for p in some]) for some in (every, biases))
    torch.testing.assert_close(slots.clip_grad_norm_(1.0, others=[extra]), whole)
    clipped = nn.utils.get_total_norm([parameter.grad for parameter in every])
    torch.testing.assert_close(clipped, torch.ones(()))
    bound.step()
    reading = slots.read_gradient_health(slots["0"])
    assert reading is not None
    assert reading.host_norm == pytest.approx(float(own))


def test_binding_refuses_a_second_and_a_foreign_optimizer(hosts: Any) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"])
    with pytest.raises(ValueError, match=r"none of the host's parameters.*or.*freeze the host"):
        run.slots.bind(OPTIMIZERS["SGD"](hosts["mlp"].build().parameters()))
    run.slots.bind(run.optimizer)
    with pytest.raises(ValueError, match=r"bound to a SGD already.*unbind"):
        run.slots.bind(OPTIMIZERS["Adam"](run.model.parameters()))


def test_rebinding_uses_the_same_groups_and_takes_living_seeds_along(hosts: Any) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"])
    run.slot.germinate("mlp")
    run.slot.advance(force=True)
    optimizer = OPTIMIZERS["AdamW"](run.model.parameters())
    seed = run.seed_parameters()
    for _ in range(2):
        run.slots.bind(optimizer)
        run.optimizer = optimizer
        assert [set(seed) <= set(g["params"]) for g in optimizer.param_groups] == [False, True]
        assert run.moved(seed) == {True}
        run.slots.unbind()


def test_a_seed_committed_while_unbound_is_trained_where_the_same_optimizer_is_bound(
    hosts: Any, grow: Any
) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"])
    run.slots.bind(run.optimizer)
    run.slots.unbind()
    grow(run.slot, "mlp", SeedStage.FOSSILIZED)
    seed = run.slot.branch(0)
    run.slots.bind(run.optimizer)
    places = [set(seed.parameters()) <= set(g["params"]) for g in run.optimizer.param_groups]
    assert places == [True, False]
    run.slots.unbind()
    other = OPTIMIZERS["SGD"](run.model.head.parameters())
    run.slots.bind(other)
    assert not any(map(run.slots.binding.holds, seed.parameters())), "left out on purpose"


NEVER_MOVE = r"SGD trains what is around the committed seeds 'lora' in '0', and not these: unless"


@pytest.mark.parametrize(
    ("without", "warns"),
    [
        (lambda seed, host: seed, True),
        (lambda seed, host: [*seed, *host[2:]], True),  # the slot's module is trained
        (lambda seed, host: [*seed, host[0]], False),
        (lambda seed, host: [seed[0]], False),
        (lambda seed, host: [], False),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_binding_warns_of_committed_seeds_that_an_optimizer_was_made_before(
    without: Any, warns: bool, frozen: bool, grow: Any
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    host = list(model.parameters())
    slots = esper.attach(model, "0", example=torch.randn(2, 4))
    grow(slots["0"], "lora", SeedStage.FOSSILIZED)
    seed = list(slots["0"].branches.requires_grad_(not frozen).parameters())
    missing = without(seed, host)
    optimizer = optim.SGD([p for p in [*host, *seed] if not any(p is q for q in missing)], lr=0.1)
    with pytest.warns(UserWarning, match=NEVER_MOVE) if warns and not frozen else nullcontext():
        slots.bind(optimizer)
    slots.unbind()
    slots.bind(optimizer)  # which has its groups, and commits and prunes are followed


@pytest.mark.parametrize(
    "body", [nn.Tanh, lambda: nn.Linear(8, 8).requires_grad_(requires_grad=False)]
)
def test_binding_warns_where_what_a_committed_seed_stands_behind_has_nothing_to_train(
    body: Callable[[], nn.Module], grow: Any
) -> None:
    model = nn.Sequential(OrderedDict(stem=nn.Linear(4, 8), body=body(), head=nn.Linear(8, 2)))
    host = [p for p in model.parameters() if p.requires_grad]
    slots = esper.attach(model, "body", example=torch.randn(2, 4))
    grow(slots["body"], "lora", SeedStage.FOSSILIZED)
    with pytest.warns(UserWarning, match="'lora' in 'body'"):
        slots.bind(optim.SGD(host, lr=0.1))
    slots.unbind()
    slots.bind(optim.SGD(model.head.parameters(), lr=0.1))


def test_detaching_leaves_no_seed_in_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    slots = esper.attach(model, ["0", "1"], example=torch.zeros(2, 4))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    slots.bind(optimizer)
    for slot in slots.values():
        slot.germinate("mlp_small")
    esper.detach(model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 0, 0]


def test_detaching_a_part_leaves_the_optimizer_to_the_slots_that_stay(grow: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    slots = esper.attach(model, ["0", "1"], example=torch.zeros(2, 4))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    slots.bind(optimizer)
    slots["0"].germinate("mlp_small")
    esper.detach(model[0])
    assert list(slots) == ["1"]
    grow(slots["1"], "mlp_small", SeedStage.PROBATIONARY)
    before = copy.deepcopy(slots["1"].seed.state_dict())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    slots.tick()
    after = slots["1"].seed.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    esper.detach(model)
    assert slots.binding is None


def test_groups_carry_parameter_names_where_the_optimizer_does(hosts: Any) -> None:
    case = hosts["mlp"]
    run = Run(case, lambda p: optim.SGD(case.build().parameters(), lr=0.1))
    run.optimizer = optim.SGD(run.model.named_parameters(), lr=0.1)
    run.slots.bind(run.optimizer)
    run.slot.germinate("lora")
    names = ["second.lora.seed.down.weight", "second.lora.seed.up.weight"]
    assert run.optimizer.param_groups[1]["param_names"] == names
    for _ in range(4):
        run.slot.advance(force=True)
    run.slot.commit()
    assert run.optimizer.param_groups[0]["param_names"][-2:] == names
    assert run.optimizer.param_groups[1]["param_names"] == []


@pytest.mark.parametrize("reloads", [False, True])
@pytest.mark.parametrize("learning_rate", [0.1, torch.tensor(0.1)])
def test_multiplier_and_warmup_act_exactly_and_on_each_seed_alone(
    hosts: Any, learning_rate: Any, reloads: bool
) -> None:
    run = Run(
        hosts["mlp"],
        lambda p: optim.SGD(p, lr=learning_rate),
        reloads=reloads,
        learning_rate_multiplier=3.0,
        warmup_steps=4,
    )
    run.slots.bind(run.optimizer)
    run.step()  # of the host alone
    for _ in ("a seed", "the next one in its place"):
        run.slot.germinate("mlp")
        run.step()
        run.slot.advance(force=True)
        seed, host = set(run.seed_parameters()), run.slots.host_parameters()
        for factor in (0.75, 1.5, 2.25, 3.0, 3.0):
            before = {p: p.detach().clone() for p in [*seed, *host]}
            gradients = {}
            hook = run.optimizer.register_step_pre_hook(
                lambda *_, kept=gradients, of=before: kept.update((p, p.grad.clone()) for p in of)
            )
            run.step()
            hook.remove()
            for parameter, old in before.items():
                rate = 0.1 * factor if parameter in seed else 0.1
                expected = old - rate * gradients[parameter]
                torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-8)
            rates = [float(group["lr"]) for group in run.optimizer.param_groups]
            assert rates == [pytest.approx(0.1)] * 2
        run.slot.prune()
        counted = run.slots.binding.state_dict()
        run.step()
        assert run.slots.binding.state_dict() == counted, "no seed is there to warm up"
        run.wait_until_dormant()


def test_a_step_that_raises_leaves_no_learning_rate_behind(hosts: Any) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"], learning_rate_multiplier=0.5)
    run.slots.bind(run.optimizer)
    run.slot.germinate("mlp")
    run.slot.advance(force=True)

    def fail() -> float:
        raise ArithmeticError("planted")

    for _ in range(2):
        with pytest.raises(ArithmeticError):
            run.optimizer.step(fail)
    run.step()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.05, 0.05]


def test_a_frozen_seed_stays_put_in_a_step_that_does_not_run_it(hosts: Any) -> None:
    """As with stochastic depth, where no gradient arrives that could be dropped."""
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"], set_to_none=False)
    run.slots.bind(run.optimizer)
    run.slot.germinate("mlp")
    run.slot.advance(force=True)
    seed = run.seed_parameters()
    run.moved(seed)
    run.slot.advance(force=True)
    run.slot.advance(force=True)
    before = [parameter.detach().clone() for parameter in seed]
    run.model.first(run.case.inputs()).sum().backward()
    run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, seed, strict=True))


@pytest.mark.parametrize("in_closure", [False, True])
def test_a_frozen_seed_stays_put_where_a_loop_assigns_the_gradients_itself(
    in_closure: bool, hosts: Any
) -> None:
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"])
    run.slots.bind(run.optimizer)
    run.slot.germinate("mlp")
    for _ in range(3):
        run.slot.advance(force=True)
    assert run.slot.frozen
    seed = run.seed_parameters()
    before = [parameter.detach().clone() for parameter in seed]

    def assign() -> float:
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return 0.0

    if in_closure:
        run.optimizer.step(assign)
    else:
        assign()
        run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, seed, strict=True))


def test_a_seed_is_guarded_after_loading_while_it_was_not_to_learn(hosts: Any) -> None:
    """As in a GAN, where it is the other network's turn."""
    run = Run(hosts["mlp"], OPTIMIZERS["SGD"])
    run.slot.germinate("mlp")
    run.slot.advance(force=True)
    run.model.requires_grad_(False)
    run.model.load_state_dict(run.model.state_dict())
    run.model.requires_grad_(True)
    seed = run.seed_parameters()
    sum(parameter.sum() * torch.nan for parameter in seed).backward()
    assert not any(parameter.grad.any() for parameter in seed)


def test_commit_keeps_training_as_the_inlined_module_does(
    hosts: Any, grow: Any, bits_of: Any
) -> None:
    """From a trial through a commit, bit for bit, momentum included."""
    case = hosts["mlp"]
    runs = [Run(case, OPTIMIZERS["SGD"]) for _ in range(2)]
    for run in runs:
        torch.manual_seed(0)
        run.slots.bind(run.optimizer)
        grow(run.slot, case.blueprint, SeedStage.PROBATIONARY)
        for _ in range(3):
            run.step()
        if run is runs[0]:
            run.slot.commit()
        for _ in range(3):
            run.step()
    first, second = ([bits_of(p) for p in run.model.parameters()] for run in runs)
    assert first == second
