"""A step's path neither waits for the device nor makes a tensor of alpha."""

import ast
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper import SeedStage, SlotConfig, SlotSet
from esper.blending import objectives, operators, schedule, straight_through
from esper.lifecycle.learning import Isolation
from esper.seeds import cnn, noop, seed, transformer
from esper.slots import (
    branch,
    gradient_guard,
    gradient_health,
    gradient_projection,
    isolation_monitor,
    living_slot,
    modes,
    optimizer_binding,
    owned_slots,
    replication,
    shadow_pass,
    slot,
    slot_forward,
    slot_set,
)
from esper.slots.gradient_health import GradientHealth
from esper.slots.isolation_monitor import IsolationMonitor
from esper.training import running_statistics
from waiting import waiting_raises

STEP_PATH: dict[ModuleType, set[str] | None] = {
    slot: {"tick"},
    living_slot: {
        "learns_in_shadow",
        "note_shadow_pass",
        "check_shadow_gradient",
        "_count_training_step",
        "_count_nonfinite_step",
        "_has_gradient",
    },
    shadow_pass: None,
    slot_forward: None,
    slot_set: {
        "tick",
        "shadow_pass",
        "_before_step",
        "clip_grad_norm_",
        "_average_gradients",
    },
    owned_slots: {"host_parameters", "living_slots", "_living_seeds"},
    replication: {  # not what reads where a gradient is lacking, or what the step before has told
        "average_gradients",
        "_average",
        "_flat_gradient",
        "end_step",
        "_withhold_failures",
    },
    gradient_guard: {"_arrived", "zero_if_broken"},  # not what reads on a CPU
    gradient_health: {"step_is_due", "measure", "gradient_norm", "note_before_clipping"},
    gradient_projection: None,
    isolation_monitor: {
        "due",
        "check",
        "judge",
        "is_of",
        "_run",
        "_beside_the_step",
        "_tolerance",
        "_modes",
        "_host_parameters",
        "_last_check",
        "_record",
        "_checkable",
        "_phase",
        "_steps_to_ripe",
        "_steps_to_next_phase",
    },
    optimizer_binding: {
        "_step_begins",
        "_step_ends",
        "_filled_groups",
        "_restore_learning_rates",
    },
    modes: {
        "active",
        "unchanged",
        "unchanged_buffers",
        "beside_the_step",
        "forked_random_state",
        "_forked_torch_streams",
        "_other_streams_unchanged",
    },
    objectives: None,
    operators: None,
    straight_through: None,
    schedule: None,
    branch: None,
    seed: None,
    cnn: {"increment"},
    transformer: {"increment"},
    noop: None,
    running_statistics: {"keep", "is_as_it_was"},
}
"""Functions that run between two steps, by module; None is all of them."""

WAITING_METHODS = {
    "cpu",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "synchronize",
    "tolist",
    "unique",
}
WAITING_FUNCTIONS = {"bool", "float", "int", "print"}


def functions(tree: ast.AST, names: set[str] | None) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (names is None or node.name in names):
            yield node


def waits(function: ast.FunctionDef) -> list[str]:
    """Return the calls in a function that wait for the device."""
    found = []
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in WAITING_METHODS:
            found.append(f"{function.name}:{node.lineno} .{called.attr}()")
        if isinstance(called, ast.Name) and called.id in WAITING_FUNCTIONS:
            found.append(f"{function.name}:{node.lineno} {called.id}()")
    return found


@pytest.mark.parametrize("module", STEP_PATH, ids=lambda module: module.__name__)
def test_no_call_in_the_step_path_waits_for_the_device(module: ModuleType) -> None:
    tree, names = ast.parse(inspect.getsource(module)), STEP_PATH[module]
    checked = list(functions(tree, names))
    assert names is None or {function.name for function in checked} == names
    assert [call for function in checked for call in waits(function)] == []


@pytest.mark.parametrize(
    "call",
    [
        "loss.item()",
        "norm.cpu()",
        "alpha.tolist()",
        "alpha.detach().numpy()",
        "float(alpha)",
        "bool(found.any())",
        "int(count)",
        "torch.cuda.synchronize()",
        "mask.nonzero()",
        "torch.nonzero(mask)",
    ],
)
@pytest.mark.parametrize("module", STEP_PATH, ids=lambda module: module.__name__)
def test_a_planted_wait_is_found_in_every_function(module: ModuleType, call: str) -> None:
    tree = ast.parse(inspect.getsource(module))
    for function in functions(tree, STEP_PATH[module]):
        function.body.insert(0, ast.parse(f"if True:\n    kept = {call}").body[0])
        assert waits(function), function.name


class Log(TorchDispatchMode):
    """Records every operation with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func._schema.name, args, result))
        return result

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


WAITING_OPERATIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class Run:
    """A host whose two slots are in the given stage, past its first steps."""

    def __init__(
        self, host: Any, stage: SeedStage, grow: Any, device: str = "cpu", **config: Any
    ) -> None:
        self.model = host.build().to(device)
        self.inputs, self.labels = host.inputs().to(device), host.labels().to(device)
        self.slots: SlotSet = esper.attach(
            self.model,
            host.targets,
            example=self.inputs,
            config=SlotConfig(isolation=Isolation.SHADOWING, **config),
        )
        self.slots.gradient_health = GradientHealth(interval_steps=1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.slots.bind(self.optimizer)
        for slot_ in self.slots.values():
            if stage is not SeedStage.DORMANT:
                grow(slot_, host.blueprint, stage)
            if stage is SeedStage.BLENDING:
                slot_.set_alpha_target(1.0, 100)
        for _ in range(2):
            self.step()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.inputs), self.labels)

    def step(self) -> None:
        self.slots.shadow_pass(self.loss)
        self.loss().backward()
        self.slots.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the guard go the way of gradients that are not on a CPU."""
    monkeypatch.setattr(gradient_guard, "_is_known_finite", lambda _: False)


STAGES = [
    SeedStage.DORMANT,
    SeedStage.GERMINATED,
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.SHADOWING,
    SeedStage.PROBATIONARY,
    SeedStage.FOSSILIZED,
]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_whole_step_reads_no_value_from_the_device(
    host: Any, stage: SeedStage, operator: str, grow: Any
) -> None:
    run = Run(host, stage, grow, blend_operator=operator, warmup_steps=10)
    with Log() as log:
        run.step()
    assert len(log.calls) > 20
    assert not WAITING_OPERATIONS.intersection(log.names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", STAGES)
def test_a_whole_step_does_not_wait_for_a_gpu(host: Any, stage: SeedStage, grow: Any) -> None:
    run = Run(host, stage, grow, device="cuda", warmup_steps=10)
    with waiting_raises():
        run.step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(run.loss())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("objective", ["plain", "norm_cap", "correlation", "shadow"])
def test_a_step_behind_the_host_reads_no_value_from_the_device(
    host: Any, objective: str, grow: Any
) -> None:
    run = Run(host, SeedStage.TRAINING, grow, objective=objective)
    with Log() as log:
        run.step()
    assert not WAITING_OPERATIONS.intersection(log.names)


@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING])
def test_a_check_of_isolation_reads_no_value_from_the_device(
    host: Any, stage: SeedStage, operator: str, grow: Any
) -> None:
    run = Run(host, stage, grow, blend_operator=operator)
    monitor = IsolationMonitor(run.slots)
    with Log() as log:
        monitor.check(run.loss, step=0)
    assert len(log.calls) > 100
    assert not WAITING_OPERATIONS.intersection(log.names)
    assert [reading.checks for reading in monitor.read()] == [1]


@pytest.mark.parametrize("plant", [lambda h: float(h.sum()), lambda h: bool(h.any())])
def test_a_planted_read_is_noticed(host: Any, grow: Any, plant: Callable[[Tensor], Any]) -> None:
    run = Run(host, SeedStage.TRAINING, grow)
    slot_ = run.slots[host.targets[0]]
    slot_.seed.register_forward_hook(lambda module, args, output: None)
    slot_.living.register_forward_hook(lambda module, args, output: plant(output) and None)
    with Log() as log:
        run.step()
    assert WAITING_OPERATIONS.intersection(log.names)


@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.SHADOWING])
def test_a_blended_forward_uses_alphas_buffer_itself_and_makes_no_scalar(
    host: Any, stage: SeedStage, operator: str, grow: Any
) -> None:
    run = Run(host, stage, grow, blend_operator=operator)
    alphas = {slot_.blend_alpha.data_ptr() for slot_ in run.slots.values()}
    with Log() as log:
        run.model(run.inputs)
    users = []
    for name, args, result in log.calls:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if any(tensor.data_ptr() in alphas for tensor in tensors):
            users.append(name)
        made = result if isinstance(result, (tuple, list)) else [result]
        scalars = [tensor for tensor in made if isinstance(tensor, Tensor) and tensor.ndim == 0]
        counts_batches = name == "aten::add_"  # of the host's batch norm
        assert not scalars or counts_batches, name
    assert set(users) == {"aten::addcmul"}
    assert len(users) == 2


def test_alpha_is_written_in_place(host: Any, grow: Any) -> None:
    run = Run(host, SeedStage.BLENDING, grow)
    slot_ = run.slots[host.targets[0]]
    buffer, address, seen = slot_.blend_alpha, slot_.blend_alpha.data_ptr(), []
    for _ in range(5):
        run.step()
        seen.append(float(buffer))
    slot_.prune(over_steps=2)
    run.step()
    run.step()
    assert seen == sorted(set(seen))
    assert float(buffer) == 0.0
    assert slot_.blend_alpha is buffer
    assert buffer.data_ptr() == address


def test_a_step_with_slots_runs_the_operations_of_the_inlined_seed_and_one_mix(
    hosts: Any, grow: Any
) -> None:
    """The forward's cost, counted: h + a * u is one operation more than u alone."""
    host = hosts["mlp"]
    inputs = host.inputs()
    counts = {}
    for stage in STAGES:
        run = Run(host, stage, grow)
        with Log() as log:
            run.model(inputs)
        counts[stage] = len([name for name in log.names if name != "aten::detach"])
    features = torch.randn(4, 8)
    with Log() as log:
        run.slots[host.targets[0]].branches[0].seed.increment(features)
    seed_alone = len([name for name in log.names if name != "aten::detach"])
    plain = counts[SeedStage.DORMANT]
    assert counts[SeedStage.GERMINATED] == plain
    for stage in (SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY):
        assert counts[stage] == plain + 2 * (seed_alone + 1), stage
    assert counts[SeedStage.FOSSILIZED] == counts[SeedStage.PROBATIONARY]
    copies = 1  # the first slot's features are overwritten by the host
    views = 1
    assert counts[SeedStage.TRAINING] == plain + 2 * seed_alone + copies + views


def test_a_parameterless_host_module_is_measured_too(grow: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    slots = esper.attach(model, "1", example=torch.randn(2, 6))
    grow(slots["1"], "norm", SeedStage.TRAINING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slots.bind(optimizer)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert slots.read_gradient_health(slots["1"]).host_norm > 0
