"""A copied block that begins with its original's optimizer state, under torch's optimizers."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import esper
from esper import SeedStage
from esper.lifecycle.learning import Isolation

UNSUITED = {"LBFGS", "Muon", "SparseAdam"}
"""One group only, matrices only, sparse gradients only."""
OPTIMIZERS = [
    name
    for name, kind in inspect.getmembers(optim, inspect.isclass)
    if issubclass(kind, optim.Optimizer) and name not in {*UNSUITED, "Optimizer"}
]


def make_optimizer(name: str, model: nn.Module) -> optim.Optimizer:
    settings: dict[str, Any] = {"SGD": {"lr": 0.1, "momentum": 0.9}}.get(name, {})
    return getattr(optim, name)(model.parameters(), **settings)


class Run:
    """A host of `B D` features with slots behind both its layers, after some steps."""

    def __init__(self, case: Any, optimizer: str, *, steps: int = 2) -> None:
        self.case, self.model = case, case.build()
        self.slots = esper.attach(
            self.model,
            case.targets,
            example=case.inputs(),
            config=esper.SlotConfig(isolation=Isolation.NONE),
        )
        self.optimizer = make_optimizer(optimizer, self.model)
        self.slots.bind(self.optimizer)
        for index in range(steps):
            self.step(index)

    @property
    def slot(self) -> esper.SeedSlot:
        return self.slots["second"]

    def step(self, index: int = 0) -> None:
        F.cross_entropy(self.model(self.case.inputs(index)), self.case.labels(index)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()

    def copied(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the state of each original with that of each copy of it."""
        originals = dict(self.model.second.named_parameters())
        return [
            (self.optimizer.state[originals[name]], self.optimizer.state[parameter])
            for copy in self.slot.seed.copies
            for name, parameter in copy.named_parameters()
        ]


def assert_same_state(original: dict[str, Any], copy: dict[str, Any]) -> None:
    assert original.keys() == copy.keys()
    assert original
    for key, value in original.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, copy[key]), key
            assert value.data_ptr() != copy[key].data_ptr(), key
        else:
            assert value == copy[key], key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_begin_with_their_originals_state_and_go_on_with_their_own(name: str, hosts: Any):
    run = Run(hosts["mlp"], name)
    run.slot.germinate("block", source="own", depth=2, copy_optimizer_state=True)
    pairs = run.copied()
    assert len(pairs) == 4  # weight and bias, twice
    for original, copy in pairs:
        assert_same_state(original, copy)
    while run.slot.stage is not SeedStage.PROBATIONARY:
        run.slot.advance(force=True)
    run.step()
    for original, copy in run.copied():
        tensors = [key for key, value in original.items() if isinstance(value, Tensor)]
        counts = [key for key in tensors if key == "step"]
        assert all(torch.equal(original[key], copy[key]) for key in counts)
        assert not all(torch.equal(original[key], copy[key]) for key in tensors)


def test_what_is_no_copy_starts_fresh(hosts: Any):
    run = Run(hosts["mlp"], "AdamW")
    run.slot.germinate("block", source="own", copy_optimizer_state=True)
    (gain,) = run.slot.seed.output_layers
    assert gain.weight not in run.optimizer.state
    run.slots["first"].germinate("block", source="second")
    new = run.slots["first"].seed.parameters()
    assert not any(parameter in run.optimizer.state for parameter in new)


def test_own_is_the_module_in_front_and_is_told_by_its_path(hosts: Any):
    run = Run(hosts["mlp"], "AdamW")
    *_, germinated = run.slot.germinate("block", source="own")
    assert germinated.options == {"source": "second"}
    assert torch.equal(run.slot.seed.block.weight, run.model.second.weight)


def opaque(optimizer: optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["history"] = []


@pytest.mark.parametrize(
    ("optimizer", "steps", "options", "message"),
    [
        ("AdamW", 2, {"blueprint": "mlp"}, r"slot 'second'.*: copy_optimizer_state needs a source"),
        ("AdamW", 2, {"blueprint": "block"}, r"copy_optimizer_state needs a source"),
        ("AdamW", 0, {}, r"the AdamW holds no state of 'second' to copy: it has not made a step"),
        ("opaque", 2, {}, r"the AdamW keeps 'history' per parameter, a list; only tensors and"),
        ("unbound", 2, {}, r"there is no optimizer to copy the state of 'second' in"),
    ],
)
def test_what_cannot_be_copied_is_refused_and_leaves_no_trace(
    optimizer: str,
    steps: int,
    options: dict[str, Any],
    message: str,
    hosts: Any,
    fingerprint: Any,
):
    run = Run(hosts["mlp"], "AdamW", steps=steps)
    if optimizer == "opaque":
        opaque(run.optimizer)
    if optimizer == "unbound":
        run.slots.unbind()
    run.step() if steps else None
    before = fingerprint(run.model), len(run.optimizer.state)
    wanted = {"blueprint": "block", **({} if options else {"source": "own"}), **options}
    with pytest.raises(ValueError, match=message):
        run.slot.germinate(**wanted, copy_optimizer_state=True)
    assert (fingerprint(run.model), len(run.optimizer.state)) == before
    assert run.slot.stage is SeedStage.DORMANT
    assert all(not group["params"] for group in run.optimizer.param_groups[1:])
