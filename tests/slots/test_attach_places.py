"""Where slots can stand: chains, tuples, dicts, batches, features that the host overwrites."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.learning import Isolation
from esper.seeds import Family


class Split(NamedTuple):
    features: Tensor
    weights: Tensor


class TupleLayer(nn.Module):
    """Returns its features in a tuple, a list or a named tuple."""

    def __init__(self, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.kind = kind

    def forward(self, inputs: Tensor) -> Any:
        return self.kind(self.linear(inputs), inputs.sum(-1))


class TupleHost(nn.Module):
    def __init__(self, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer = TupleLayer(kind)
        self.seen: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs)
        self.seen.append(output)
        return output[0] + output[1][..., None]


@pytest.mark.parametrize(
    "kind", [lambda *a: tuple(a), lambda *a: list(a), Split], ids=["tuple", "list", "named tuple"]
)
def test_the_first_of_several_outputs_is_slotted_and_the_others_pass(
    kind: Any, grow: Any, randomise: Any
) -> None:
    model, inputs = TupleHost(kind), torch.randn(4, 6)
    slots = esper.attach(model, "layer", example=inputs)
    plain = model.seen[-1]
    grow(slots["layer"], "mlp", SeedStage.PROBATIONARY)
    randomise(slots["layer"].living)
    model(inputs)
    seen = model.seen[-1]
    assert type(seen) is type(plain)
    assert torch.equal(seen[0], slots["layer"].seed(plain[0]))
    assert torch.equal(seen[1], plain[1])


def test_a_slot_on_a_chain_keeps_the_path_it_was_given_and_sees_the_chains_output(
    hosts: Any, grow: Any, randomise: Any
) -> None:
    host = hosts["cnn"]
    model = host.build().eval()
    outputs: list[Tensor] = []
    model.block.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    slots = esper.attach(model, "block", example=host.inputs())
    assert list(slots) == ["block"]
    assert slots["block"].path == "block"
    assert len(model.block) == 3
    model(host.inputs())
    grow(slots["block"], "conv_light", SeedStage.PROBATIONARY)
    randomise(slots["block"].living)
    model(host.inputs())
    assert torch.equal(outputs[-1], slots["block"].seed(outputs[-2]))


def test_nested_chains_end_in_their_last_child() -> None:
    inner = nn.Sequential(OrderedDict(a=nn.Linear(6, 8), b=nn.Tanh()))
    model = nn.Sequential(OrderedDict(trunk=nn.Sequential(inner), head=nn.Linear(8, 3)))
    esper.attach(model, "trunk", example=torch.randn(2, 6))
    assert hasattr(model.trunk[0].b, "esper_slot")


def test_slots_nest_and_run_inside_out(grow: Any, randomise: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.tanh(self.inner(inputs))

    model, inputs = nn.Sequential(Wrapper(), nn.Linear(6, 3)), torch.randn(4, 6)
    slots = esper.attach(model, ["0", "0.inner"], example=inputs)
    for slot in slots.values():
        grow(slot, "mlp", SeedStage.PROBATIONARY)
        randomise(slot.living)
    first, last = model[0].inner, model[1]
    inner = slots["0.inner"].seed(F.linear(inputs, first.weight, first.bias))
    expected = last(slots["0"].seed(torch.tanh(inner)))
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize(
    ("name", "pattern", "paths"),
    [
        ("tokens", "blocks.*", ["blocks.0", "blocks.1"]),
        ("tokens", "blocks.[1-9]", ["blocks.1"]),
        ("tokens", ["blocks.1", "blocks.0", "blocks.0"], ["blocks.0", "blocks.1"]),
        ("mlp", "*", ["first", "second", "dropout", "head"]),
        ("cnn", "[ns]*", ["stem", "norm"]),
    ],
)
def test_patterns_match_part_by_part_and_slots_stand_in_module_order(
    hosts: Any, name: str, pattern: Any, paths: list[str]
) -> None:
    model, inputs = hosts[name].build(), hosts[name].inputs()
    assert list(esper.attach(model, pattern, example=inputs)) == paths


def test_a_path_with_the_signs_of_a_pattern_names_its_module_alone() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("linear[3x3]", "linear3", "max?", "maxx")
            self.ops = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})

        def forward(self, inputs: Tensor) -> Tensor:
            return nn.Sequential(*self.ops.values())(inputs)

    paths = ["ops.linear[3x3]", "ops.max?"]
    assert list(esper.attach(Cell(), paths, example=torch.randn(2, 6))) == paths


def test_a_host_may_return_what_has_no_memory_of_its_own() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            return torch.sparse.mm(edges, self.layer(nodes)), edges

    example = (torch.randn(5, 6), torch.eye(5).to_sparse())
    assert not esper.attach(Graph(), "layer", example=example)["layer"].layout.overwritten


class TakesKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, features: Tensor, *, state: Any = None, scale: float = 1.0) -> Tensor:
        assert state is None or isinstance(state, tuple)
        return self.layer(features) * scale


X, Y = torch.randn(5, 6), torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    "example",
    [
        X,
        (X,),
        (X, Y),
        [X, Y],
        ({"features": X, "scale": 2.0}, Y),
        {"features": X, "state": (X, X), "labels": Y},
    ],
    ids=["tensor", "tuple", "batch", "list", "batch of dict", "dict with more keys"],
)
def test_the_example_may_be_what_a_data_loader_gives(example: Any) -> None:
    slots = esper.attach(TakesKeywords(), "layer", example=example)
    assert slots["layer"].layout.shape == (5, 8)
    assert slots["layer"].family is Family.TRANSFORMER


def test_the_family_follows_the_features_unless_it_is_given() -> None:
    maps = torch.randn(2, 3, 4, 5)
    model = nn.Sequential(nn.Conv2d(3, 7, 1), nn.Flatten(2))
    slot = esper.attach(model, "0", example=maps)["0"]
    assert (slot.family, slot.dim) == (Family.CNN, 7)
    last = nn.Sequential(nn.Linear(5, 6))
    slot = esper.attach(last, "0", example=maps, family="transformer")["0"]
    assert (slot.family, slot.dim) == (Family.TRANSFORMER, 6)
    slot.germinate("mlp")


class Overwrites(nn.Module):
    """Changes the features of `layer` in place right behind it, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.3, inplace=True)
        self.head = nn.Linear(8, 3)
        self.how = how

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.layer(inputs)
        if self.how == "in-place module":
            features = self.relu(features)
        elif self.how == "in-place function":
            features = F.relu_(features)
        elif self.how == "in-place arithmetic":
            features *= 0.5
        elif self.how == "through a view":
            features[:, :4].mul_(2.0)
        elif self.how == "in-place dropout":
            features = self.dropout(features)
        elif self.how == "in-place dropout of a view":
            features = self.dropout(features.view(-1, 2, 4)).flatten(1)
        elif self.how == "in training only":
            features = F.dropout(features, 0.3, self.training, inplace=True)
        elif self.how == "in training, which wants targets" and self.training:
            if len(inputs) < 4:
                raise ValueError("in train mode it takes whole batches")
            features *= 0.5
        return features if self.how == "by the loss" else self.head(features)


@pytest.mark.parametrize(
    "how",
    [
        "in-place module",
        "in-place function",
        "in-place arithmetic",
        "through a view",
        "in-place dropout",
        "in-place dropout of a view",
        "in training only",
        "in training, which wants targets",
        "by the loss",
    ],
)
@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
def test_features_that_the_host_overwrites_train_as_without_a_slot(
    how: str, operator: str, bits_of: Any
) -> None:
    def train(with_slot: bool) -> list[bytes]:
        torch.manual_seed(0)
        model = Overwrites(how)
        own = list((model.layer if how == "by the loss" else model).parameters())
        inputs = torch.randn(4, 6)
        optimizer = torch.optim.SGD(own, lr=0.1)
        slot = None
        if with_slot:
            config = SlotConfig(blend_operator=operator, isolation=Isolation.SHADOWING)
            slots = esper.attach(model, "layer", example=inputs[:3], config=config)
            slots.bind(optimizer)
            slot = slots["layer"]
            assert slot.layout.overwritten
            slot.germinate("mlp")
            slot.advance(force=True)
        trace = []
        for _ in range(5):
            output = model(inputs)
            output[:, 0] = 0.0
            output.square().mean().backward()
            trace += [bits_of(output), *(bits_of(p.grad) for p in own)]
            optimizer.step()
            optimizer.zero_grad()
        if slot is not None:
            assert slot.seed.contract.weight.any()
            for _ in range(3):
                slot.advance(force=True)
                model(inputs).square().mean().backward()
        return trace

    assert train(with_slot=True) == train(with_slot=False)


def test_features_nobody_overwrites_are_not_copied(grow: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs, seen = torch.randn(4, 6), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    slots = esper.attach(model, "0", example=inputs)
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    grow(slots["0"], "mlp", SeedStage.TRAINING)
    seen.clear()
    model(inputs)
    before, after = seen
    assert after.data_ptr() == before.data_ptr()


class ExpandedMask(nn.Module):
    """Has a buffer in which each place is there several times, with a NaN, and one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        column = torch.tensor([[1.0], [torch.nan], [2.0]])
        self.register_buffer("mask", column.expand(3, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.mask[:, :1] += 1
        return self.layer(inputs) * self.mask.nan_to_num()


def test_expanded_buffers_are_left_as_they_were(bits_of: Any) -> None:
    model = ExpandedMask()
    mask, before = model.mask, bits_of(model.mask)
    esper.attach(model, "layer", example=torch.randn(3, 4))
    assert model.mask is mask
    assert mask.stride() == (1, 0)
    assert bits_of(mask) == before
    assert float(model.calls) == 0.0


@pytest.mark.parametrize("norm", [nn.Identity, nn.LazyBatchNorm1d])
def test_lazy_modules_of_torch_become_what_they_are(norm: type[nn.Module], bits_of: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(8), norm(), nn.Linear(8, 1))
    esper.attach(model, "0", example=torch.randn(3, 4))
    assert type(model[0]) is nn.Linear
    fresh = nn.BatchNorm1d(8) if norm is nn.LazyBatchNorm1d else nn.Identity()
    assert type(model[1]) is type(fresh)
    kept = dict(model[1].named_buffers())
    assert {name: bits_of(buffer) for name, buffer in kept.items()} == {
        name: bits_of(buffer) for name, buffer in fresh.named_buffers()
    }
