"""The isolation monitor finds every leak, blames nobody else, and leaves the step as it was."""

import dataclasses
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper import SeedSlot, SeedStage, SlotConfig
from esper.lifecycle.learning import Isolation
from esper.seeds import Family, blueprints
from esper.slots import IsolationMonitor
from esper.slots.gradient_projection import NUM_PROJECTIONS, GradientProjections, project

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
CHECKED_STAGES = [SeedStage.TRAINING, SeedStage.BLENDING]


class Run:
    """A host whose two slots are in a stage, and which is checked before every step."""

    def __init__(
        self,
        host: Any,
        stage: SeedStage,
        grow: Any,
        *,
        blueprint: str | None = None,
        precision: str = "float32",
        interval_steps: int | None = 1,
        relative_tolerance: float | None = None,
        **config: Any,
    ) -> None:
        self.host = host
        self.dtype = PRECISIONS[precision]
        self.model = host.build()
        self.slots = esper.attach(
            self.model,
            host.targets,
            example=host.inputs(),
            config=SlotConfig(**{"isolation": Isolation.SHADOWING, **config}),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.slots.bind(self.optimizer)
        self.monitor = IsolationMonitor(
            self.slots, interval_steps=interval_steps, relative_tolerance=relative_tolerance
        )
        self.steps = 0
        for slot in self.slots.values():
            if stage is not SeedStage.DORMANT:
                grow(slot, blueprint or host.blueprint, stage)
            if stage is SeedStage.BLENDING:
                slot.set_alpha_target(1.0, 20)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            output = self.model(self.host.inputs(self.steps))
            return F.cross_entropy(output, self.host.labels(self.steps))

    def check(self) -> None:
        self.monitor.check(self.loss, step=self.steps)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.check()
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.slots.tick()
            self.steps += 1

    def violations(self) -> dict[str, tuple[int, int]]:
        """Checks and violations by slot."""
        return {r.slot: (r.checks, r.violations) for r in self.monitor.read()}


def plant_leak(run: Run, path: str, *, size: float | None = None) -> None:
    """Make the slot's seed read the host's features with their graph, or add them, `size` times."""
    seen: dict[str, Tensor] = {}

    def capture(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["features"] = output.clone()

    slot = run.slots[path]
    (place,) = [m for m in run.model.modules() if getattr(m, "esper_slot", None) is slot]
    place.register_forward_hook(capture, prepend=True)
    seed = slot.seed
    clean = seed.increment

    def leaking(features: Tensor) -> Tensor:
        if size is None:
            return clean(seen["features"])
        own = seen["features"]
        return clean(features) + size * (own - own.detach())

    seed.increment = leaking


@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize("stage", CHECKED_STAGES)
@pytest.mark.parametrize("leaky", [0, 1])
def test_seed_that_reads_undetached_features_is_found_by_its_first_check_and_nobody_else_is(
    host: Any, leaky: int, stage: SeedStage, operator: str, grow: Any
) -> None:
    run = Run(host, SeedStage.TRAINING, grow, blend_operator=operator)
    if stage is SeedStage.BLENDING:
        run.monitor.interval_steps = None
        run.step(3)
        run.monitor.interval_steps = 1
        for slot in run.slots.values():
            slot.advance(force=True)
            slot.set_alpha_target(1.0, 20)
    plant_leak(run, host.targets[leaky])
    run.step(3)  # the first without a check: no seed has learned, or alpha is 0
    guilty, innocent = host.targets[leaky], host.targets[1 - leaky]
    assert run.violations() == {guilty: (1, 1), innocent: (1, 0)}
    run.step(6)
    assert run.violations() == {guilty: (3, 3), innocent: (3, 0)}


def test_a_reading_names_what_was_reached_worst_first_and_nothing_downstream(
    hosts: Any, grow: Any
) -> None:
    host = hosts["cnn"]
    run = Run(host, SeedStage.TRAINING, grow)
    plant_leak(run, "norm", size=1.0)
    run.step(2)
    (reading,) = run.monitor.read()
    assert reading.slot == "norm"
    assert reading.blueprint == host.blueprint
    assert reading.seed_lives
    assert set(reading.reached) <= {"stem.weight", "stem.bias", "norm.weight", "norm.bias"}
    assert {"stem.weight", "norm.weight"} <= set(reading.reached)
    sizes = list(reading.reached.values())
    assert sizes == sorted(sizes, reverse=True)
    assert all(1e-3 < size < 1e3 for size in sizes)


CASES = [
    *(("cnn", name) for name in blueprints.names(Family.CNN)),
    *(("tokens", name) for name in blueprints.names(Family.TRANSFORMER)),
    ("mlp", "mlp"),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", CHECKED_STAGES)
@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize(("name", "blueprint"), CASES)
def test_clean_seeds_are_never_blamed(
    name: str,
    blueprint: str,
    operator: str,
    stage: SeedStage,
    precision: str,
    hosts: Any,
    grow: Any,
) -> None:
    run = Run(
        hosts[name],
        stage,
        grow,
        blueprint=blueprint,
        precision=precision,
        blend_operator=operator,
        relative_tolerance=1e-30,
    )
    run.step(9)
    assert run.violations() == dict.fromkeys(hosts[name].targets, (4, 0))


def test_seed_with_dropout_and_host_with_dropout_draw_the_same_in_both_passes(
    host: Any, grow: Any, test_blueprints: None
) -> None:
    run = Run(host, SeedStage.BLENDING, grow, blueprint="with_dropout", relative_tolerance=1e-30)
    run.step(9)
    assert run.violations() == dict.fromkeys(host.targets, (4, 0))


@pytest.mark.parametrize(
    "stage",
    [
        SeedStage.DORMANT,
        SeedStage.GERMINATED,
        SeedStage.SHADOWING,
        SeedStage.PROBATIONARY,
        SeedStage.FOSSILIZED,
    ],
)
def test_there_is_nothing_to_check_in_other_stages(hosts: Any, stage: SeedStage, grow: Any) -> None:
    run = Run(hosts["mlp"], stage, grow)
    run.step(3)
    assert run.violations() == {}


@pytest.mark.parametrize(
    ("isolation", "stage", "checked"),
    [
        (Isolation.NONE, SeedStage.BLENDING, False),
        (Isolation.TRAINING, SeedStage.TRAINING, True),
        (Isolation.TRAINING, SeedStage.BLENDING, False),
        (Isolation.SHADOWING, SeedStage.BLENDING, True),
    ],
)
def test_only_isolated_seeds_are_checked(
    hosts: Any, isolation: Isolation, stage: SeedStage, checked: bool, grow: Any
) -> None:
    run = Run(hosts["mlp"], stage, grow, isolation=isolation)
    run.step(3)
    assert bool(run.violations()) is checked


def test_seed_that_fades_out_and_model_in_eval_mode_are_not_checked(hosts: Any, grow: Any) -> None:
    run = Run(hosts["mlp"], SeedStage.BLENDING, grow)
    run.step(2)
    assert run.violations() == {"first": (1, 0)}
    run.model.eval()
    run.check()
    assert run.violations() == {}
    run.model.train()
    for slot in run.slots.values():
        slot.prune(over_steps=10)
    run.step(2)
    assert run.violations() == {}


def due_steps(run: Run, times: int) -> list[tuple[int, str]]:
    found = []
    for _ in range(times):
        slot = run.monitor.due(run.steps)
        if slot is not None:
            found.append((run.steps, slot.path))
        run.step()
    return found


def test_checks_fall_at_the_entry_of_a_stage_and_then_in_turn_once_per_interval(
    hosts: Any, grow: Any
) -> None:
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow, interval_steps=5)
    entry, turns = [(1, "first"), (2, "second")], [(7, "first"), (12, "second"), (17, "first")]
    assert due_steps(run, 18) == entry + turns
    halfway = [(20, "first"), (21, "second")]
    assert due_steps(run, 10) == [*halfway, (26, "first")]
    run.slots["second"].advance(force=True)
    assert due_steps(run, 3) == [], "alpha is 0"
    run.slots["second"].set_alpha_target(1.0, 50)
    assert due_steps(run, 11) == [(31, "first"), (32, "second"), (37, "first")]


def test_a_seed_that_comes_later_is_checked_when_it_is_new(hosts: Any, grow: Any) -> None:
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow, interval_steps=1000)
    slots = run.slots
    assert len(due_steps(run, 30)) == 4, "two seeds, young and ripe"
    slots["second"].prune()
    for _ in range(4):
        slots.end_epoch()
    assert due_steps(run, 3) == []
    grow(slots["second"], "mlp", SeedStage.TRAINING)
    assert due_steps(run, 3) == [(34, "second")]


def test_one_check_is_made_per_step_and_none_without_an_interval(hosts: Any, grow: Any) -> None:
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow)
    run.step()
    run.check()
    run.check()
    assert run.violations() == {"first": (1, 0)}
    run.monitor.interval_steps = None
    run.step(3)
    assert run.violations() == {}


def test_next_seed_in_a_slot_is_checked_anew_and_not_blamed_for_the_last(
    hosts: Any, grow: Any
) -> None:
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow, interval_steps=1000)
    plant_leak(run, "first", size=1.0)
    run.step(3)
    slot = run.slots["first"]
    slot.prune()
    (reading,) = [r for r in run.monitor.read() if r.violations]
    assert not reading.seed_lives
    for _ in range(4):
        run.slots.end_epoch()
    assert slot.stage is SeedStage.DORMANT
    grow(slot, "mlp", SeedStage.TRAINING)
    run.step(4)
    assert run.violations() == {"first": (1, 0)}


# What a check leaves behind


def tensors_of(run: Run, bits_of: Any) -> dict[str, bytes]:
    state = {f"state {n}": bits_of(t) for n, t in run.model.state_dict().items()}
    state |= {f"buffer {n}": bits_of(t) for n, t in run.model.named_buffers()}
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state[parameter].items():
            state[f"optimizer's {key} of {name}"] = bits_of(value)
    return {**state, "random state": bits_of(torch.get_rng_state())}


@pytest.mark.parametrize("regime", ["plain", "clip", "scaler and clip", "accumulation"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", CHECKED_STAGES)
def test_training_is_bitwise_the_same_with_the_monitor_and_without(
    host: Any,
    stage: SeedStage,
    precision: str,
    regime: str,
    grow: Any,
    bits_of: Any,
    test_blueprints: None,
) -> None:
    def trace(interval_steps: int | None) -> dict[str, bytes]:
        run = Run(
            host,
            stage,
            grow,
            blueprint="with_dropout",
            precision=precision,
            interval_steps=interval_steps,
        )
        scaler = torch.amp.GradScaler("cpu", enabled="scaler" in regime)
        torch.manual_seed(1)
        found = {}
        for step in range(8):
            if regime == "accumulation":
                run.loss().backward()
            run.monitor.check(lambda: scaler.scale(run.loss()), step=step)
            loss = run.loss()
            scaler.scale(loss).backward()
            if "clip" in regime:
                scaler.unscale_(run.optimizer)
                run.slots.clip_grad_norm_(0.05)
            found[f"loss {step}"] = bits_of(loss)
            for name, parameter in run.model.named_parameters():
                missing = parameter.grad is None
                found[f"gradient {step} {name}"] = b"" if missing else bits_of(parameter.grad)
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            run.slots.tick()
            run.steps += 1
        assert len(run.violations()) == (0 if interval_steps is None else 2)
        return {**found, **tensors_of(run, bits_of)}

    on, off = trace(1), trace(None)
    assert on.keys() == off.keys()
    assert [name for name in on if on[name] != off[name]] == []


STREAMS = {"Python": random.random, "NumPy": np.random.random}


class LayerDropHost(nn.Module):
    """Leaves its second layer out now and then, by a stream that is not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        if not self.training or self.draw() < 0.5:
            hidden = hidden + torch.tanh(self.second(hidden))
        return self.head(hidden)


@pytest.mark.parametrize("stage", CHECKED_STAGES)
@pytest.mark.parametrize("stream", STREAMS)
def test_a_host_that_draws_from_another_stream_than_torchs_is_left_its_draws_and_not_blamed(
    stream: str, stage: SeedStage, hosts: Any, grow: Any, bits_of: Any
) -> None:
    drawing = partial(LayerDropHost, STREAMS[stream])
    host = dataclasses.replace(hosts["mlp"], factory=drawing, targets=("first",))

    def trace(interval_steps: int | None) -> tuple[dict[str, bytes], float]:
        run = Run(host, stage, grow, interval_steps=interval_steps)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        run.step(9)
        assert run.violations() == ({} if interval_steps is None else {"first": (8, 0)})
        return tensors_of(run, bits_of), STREAMS[stream]()

    assert trace(1) == trace(None)


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        raise ArithmeticError("planted failure")


def num_hooks(model: nn.Module) -> int:
    on_tensors = [
        hooks
        for parameter in model.parameters()
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    ]
    on_modules = [
        hooks
        for module in model.modules()
        for key, hooks in vars(module).items()
        if key.endswith("hooks")
    ]
    return sum(len(hooks) for hooks in [*on_tensors, *on_modules] if hooks)


@contextmanager
def unchanged(run: Run, bits_of: Any) -> Iterator[None]:
    def everything() -> Any:
        slots = [
            (s.mode, s.active, s.severed, s.isolated, s.forced_alpha) for s in run.slots.values()
        ]
        gradients = [p.grad for p in run.model.parameters()]
        values = [None if gradient is None else bits_of(gradient) for gradient in gradients]
        training = [module.training for module in run.model.modules()]
        state = tensors_of(run, bits_of)
        ids = [id(buffer) for buffer in run.model.buffers()]
        objects = [id(gradient) for gradient in gradients]
        return num_hooks(run.model), slots, values, objects, training, state, ids

    before = everything()
    yield
    assert everything() == before


@pytest.mark.parametrize("stage", CHECKED_STAGES)
@pytest.mark.parametrize("accumulated", [False, True])
def test_hooks_gradients_modes_and_streams_are_as_before_a_check(
    host: Any, stage: SeedStage, accumulated: bool, grow: Any, bits_of: Any
) -> None:
    run = Run(host, stage, grow)
    run.step()
    if accumulated:
        run.loss().backward()
    with unchanged(run, bits_of):
        run.check()
    assert run.violations() == {host.targets[0]: (1, 0)}


@pytest.mark.parametrize("stage", CHECKED_STAGES)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_error_in_a_check_leaves_nothing_behind_and_says_whose_pass_it_was(
    host: Any, where: str, call: int, stage: SeedStage, grow: Any, bits_of: Any
) -> None:
    run = Run(host, stage, grow)
    run.step()
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        loss = run.loss()
        if calls < call:
            return loss
        if where == "forward":
            raise ArithmeticError("planted failure")
        return RaisesInBackward.apply(loss)

    with (
        unchanged(run, bits_of),
        pytest.raises(ArithmeticError, match="planted failure") as caught,
    ):
        run.monitor.check(failing, step=run.steps)
    assert calls == call
    assert "isolation_check_steps=None" in caught.value.__notes__[0]
    run.step(2)
    assert run.violations() == {host.targets[0]: (1, 0)}


def test_hooks_on_accumulated_gradients_do_not_run_in_a_check(hosts: Any, grow: Any) -> None:
    """An optimizer that steps in the backward would step on them."""
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow)
    run.step()
    ran: list[Tensor] = []
    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(ran.append)
    run.check()
    assert run.violations() == {"first": (1, 0)}
    assert not ran


def test_no_two_gradients_are_in_memory_at_once_and_none_is_kept(hosts: Any, grow: Any) -> None:
    run = Run(hosts["cnn"], SeedStage.BLENDING, grow)
    run.step(2)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def arrived(gradient: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(gradient))

    for parameter in run.slots.host_parameters():
        parameter.register_hook(arrived)

    def large_tensors() -> list[Tensor]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        dense = [tensor for tensor in tensors if tensor.layout is torch.strided]
        return [tensor for tensor in dense if tensor.untyped_storage().nbytes() > 64]

    before = large_tensors()
    run.check()
    assert len(seen) == 2 * len(run.slots.host_parameters())
    # The gradients of a module's weight and bias come from one operation.
    assert max(alive) <= 1
    assert not any(ref() is not None for ref in seen)
    known = {id(tensor) for tensor in before}
    assert not [tensor.shape for tensor in large_tensors() if id(tensor) not in known]
    host_targets = run.host.targets
    assert run.violations() == dict.fromkeys(host_targets, (1, 0))


# What counts


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_gives_no_verdict(hosts: Any, value: float, grow: Any) -> None:
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow)
    plant_leak(run, "first", size=1.0)
    run.step()
    run.monitor.check(lambda: run.loss() * value, step=run.steps)
    (reading,) = run.monitor.read()
    assert (reading.checks, reading.violations, reading.without_verdict) == (1, 0, 1)
    assert not reading.reached


@pytest.mark.parametrize(("size", "found"), [(1e-8, False), (1e-2, True)])
def test_a_leak_counts_from_the_tolerance_on(
    hosts: Any, size: float, found: bool, grow: Any
) -> None:
    run = Run(hosts["cnn"], SeedStage.TRAINING, grow)
    plant_leak(run, "norm", size=size)
    run.step(2)
    assert run.violations() == {"norm": (1, int(found))}


def test_leak_into_a_parameter_without_a_gradient_of_its_own_is_found(grow: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model.register_parameter("aside", nn.Parameter(torch.ones(8)))
    slots = esper.attach(model, "1", example=torch.randn(2, 6))
    grow(slots["1"], "norm", SeedStage.TRAINING)
    seed = slots["1"].seed
    clean = seed.increment
    seed.increment = lambda features: clean(features) + model.aside
    monitor = IsolationMonitor(slots)
    slots.tick()
    monitor.check(lambda: model(torch.ones(4, 6)).sum(), step=1)
    (reading,) = monitor.read()
    assert list(reading.reached) == ["aside"]


def test_seed_whose_forward_raises_in_a_check_is_not_blamed_but_pruned(
    hosts: Any, grow: Any, test_blueprints: None
) -> None:
    run = Run(hosts["mlp"], SeedStage.BLENDING, grow, blueprint="raises")
    run.step(12)
    assert all(slot.stage is SeedStage.PRUNED for slot in run.slots.values())
    assert all(violations == 0 for _, violations in run.violations().values())


def test_seed_that_raises_in_one_of_the_two_passes_only_is_not_blamed(
    hosts: Any, grow: Any, randomise: Any
) -> None:
    run = Run(hosts["mlp"], SeedStage.BLENDING, grow, interval_steps=1000)
    run.step(5)
    slot = run.slots["first"]
    randomise(slot.living)
    clean, calls = slot.seed.increment, 0

    def increment(features: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ArithmeticError("planted failure")
        return clean(features)

    slot.seed.increment = increment
    run.monitor.read()
    run.monitor.interval_steps = 1
    run.step(2)
    assert calls == 2
    assert slot.stage is SeedStage.PRUNED
    assert all(violations == 0 for _, violations in run.violations().values())


def test_sparse_complex_empty_and_frozen_parameters_do_no_harm(grow: Any) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8, sparse=True)
            self.turn = nn.Parameter(torch.ones(8, dtype=torch.complex64))
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.nothing = nn.Parameter(torch.empty(0, 8))
            self.layer = nn.Linear(8, 8)
            self.frozen = nn.Linear(8, 8).requires_grad_(requires_grad=False)

        def forward(self, tokens: Tensor) -> Tensor:
            features = (self.embed(tokens) * self.turn).real * self.scale
            features = torch.cat([features, self.nothing])
            return self.frozen(self.layer(features))

    model, tokens = Host(), torch.arange(4)
    slots = esper.attach(model, "layer", example=tokens)
    grow(slots["layer"], "mlp", SeedStage.TRAINING)
    monitor = IsolationMonitor(slots, interval_steps=1)

    def check(step: int) -> int:
        slots.tick()
        monitor.check(lambda: model(tokens).square().sum(), step=step)
        (reading,) = monitor.read()
        assert reading.without_verdict == 0
        return reading.violations

    assert check(1) == 0
    clean = slots["layer"].seed.increment
    slots["layer"].seed.increment = lambda features: clean(features) + model.turn.imag.sum()
    assert check(2) == 1


def test_host_without_a_trainable_parameter_is_not_checked(hosts: Any, grow: Any) -> None:
    run = Run(hosts["mlp"], SeedStage.TRAINING, grow)
    for parameter in run.slots.host_parameters():
        parameter.requires_grad_(requires_grad=False)
    run.step(3)
    assert run.violations() == {}


@pytest.mark.parametrize("interval_steps", [0, -1])
def test_interval_below_one_is_refused(hosts: Any, interval_steps: int, grow: Any) -> None:
    slots = Run(hosts["mlp"], SeedStage.DORMANT, grow).slots
    with pytest.raises(ValueError, match=f"at least 1, got {interval_steps}"):
        IsolationMonitor(slots, interval_steps=interval_steps)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, torch.nan])
def test_tolerance_out_of_range_is_refused(hosts: Any, tolerance: float, grow: Any) -> None:
    slots = Run(hosts["mlp"], SeedStage.DORMANT, grow).slots
    with pytest.raises(ValueError, match="between 0 and 1"):
        IsolationMonitor(slots, relative_tolerance=tolerance)


# Severing


@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize("stage", CHECKED_STAGES)
def test_a_severed_forward_computes_the_same_and_no_seed_learns(
    host: Any, stage: SeedStage, operator: str, grow: Any, bits_of: Any
) -> None:
    run = Run(host, stage, grow, blend_operator=operator)
    run.step(3)
    slot: SeedSlot = run.slots[host.targets[1]]

    def outcome() -> tuple[bytes, bool]:
        with torch.random.fork_rng(devices=()):
            loss = run.loss()
        reached = torch.autograd.grad(loss, list(slot.living.parameters()), allow_unused=True)
        return bits_of(loss), any(gradient is not None for gradient in reached)

    plain = outcome()
    with slot.sever():
        severed = outcome()
    assert plain == (severed[0], True)
    assert severed[1] is False
    assert outcome() == plain


# Projections


SHAPES = [(), (7,), (3, 5), (4, 3, 2, 2), (1, 6, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_square_of_a_projection_is_the_squared_norm(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    squares = torch.stack([project(gradient, seed) for seed in range(4000)]).square()
    assert squares.shape == (4000, NUM_PROJECTIONS)
    assert float(squares.mean()) == pytest.approx(float(gradient.square().sum()), rel=0.12)


@pytest.mark.parametrize("rank", [1, 16])
def test_a_leak_of_ten_times_the_tolerance_is_found_as_often_as_promised(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn((16, rank), generator=generator)
    right = torch.randn((rank, 32), generator=generator)
    leak = left @ right
    leak /= leak.norm()
    found = [bool(project(leak, seed).abs().amax() > 0.1) for seed in range(4000)]
    assert sum(found) / len(found) > 0.99


def test_a_leak_that_is_the_same_everywhere_is_found_too() -> None:
    """The signs of 8 rows often sum to 0."""
    leak = torch.ones(8, 9)
    found = [bool(project(leak, seed).any()) for seed in range(4000)]
    assert sum(found) / len(found) > 0.98


def test_half_precision_is_accumulated_in_float32() -> None:
    gradient = torch.full((4096, 8), 1.0 / 3.0, dtype=torch.float16)
    projection = project(gradient, 3)
    assert projection.dtype is torch.float32
    assert torch.equal(projection, project(gradient.float(), 3))
    assert project(gradient.double(), 3).dtype is torch.float64


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_signs_are_fixed_by_the_seed_and_draw_from_no_shared_stream(
    shape: tuple[int, ...], bits_of: Callable[[Tensor], bytes]
) -> None:
    gradient = torch.randn(shape)
    before = bits_of(torch.get_rng_state())
    first, again = project(gradient, 5), project(gradient, 5)
    assert bits_of(torch.get_rng_state()) == before
    assert torch.equal(first, again)
    assert len({bits_of(project(gradient, seed).abs()) for seed in range(40)}) > 2


def test_signs_differ_from_name_to_name_and_from_check_to_check() -> None:
    def projections(name: str, number: int) -> Tensor:
        parameter = nn.Parameter(torch.ones(16, 16))
        taken = GradientProjections({name: parameter}, number=number)
        taken.take((parameter * torch.arange(256.0).reshape(16, 16)).sum())
        return taken.projections(torch.device("cpu"))

    first = projections("weight", 1)
    assert torch.equal(projections("weight", 1), first)
    assert not torch.equal(projections("weight", 2), first)
    assert not torch.equal(projections("bias", 1), first)
