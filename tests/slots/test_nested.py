"""Batches go to the model's device, and are left alone where there is nothing to move."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from esper.slots.modes import sole_device
from esper.slots.nested import tensors_in, to_device

CPU, META = torch.device("cpu"), torch.device("meta")


class Pair(NamedTuple):
    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Slotted:
    """Has no dictionary, and no way to be copied but ours."""

    __slots__ = ("tokens",)
    tokens: Tensor


class Encoding(dict[str, Any]):
    """A batch of a library: a mapping with attributes that moves itself."""

    def to(self, device: torch.device) -> Self:
        return type(self)({key: value.to(device) for key, value in self.items()})


class Graph:
    """A batch of a library that no one can look into."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes

    def to(self, device: torch.device) -> Self:
        return type(self)(self.nodes.to(device))


BATCHES = [
    torch.ones(2),
    (torch.ones(2), [torch.zeros(1), "label"]),
    {"inputs": torch.ones(2), "number": 3},
    Pair(torch.ones(2), torch.zeros(2)),
    Slotted(torch.ones(2)),
    Encoding(inputs=torch.ones(2)),
    (Encoding(inputs=torch.ones(2)), torch.zeros(2)),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_every_tensor_of_a_batch_moves_and_kinds_stay(batch: Any) -> None:
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert {tensor.device for tensor in tensors_in(moved)} == {META}
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch)))
    if isinstance(batch, tuple):
        assert [type(part) for part in moved] == [type(part) for part in batch]


@pytest.mark.parametrize("batch", [*BATCHES, pack_sequence([torch.ones(3)]), "no tensor at all"])
@pytest.mark.parametrize("device", [CPU, None])
def test_what_has_nothing_to_move_is_the_same_object(
    batch: Any, device: torch.device | None
) -> None:
    assert to_device(batch, device) is batch


def test_a_host_on_several_devices_is_not_asked_where_its_inputs_go() -> None:
    split = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert sole_device(split) is None
    assert sole_device(split[0]) == CPU
    assert sole_device(nn.ReLU()) is None


def test_what_shows_no_tensors_moves_itself_beside_what_is_there_already() -> None:
    graph = Graph(torch.ones(2))
    assert to_device(graph, META).nodes.device == META
    moved = to_device({"there": torch.ones(2, device="meta"), "graphs": [graph]}, META)
    assert moved["graphs"][0].nodes.device == META


class Names(dict[str, int]):
    """A mapping of no tensors."""


def test_containers_of_no_tensors_are_the_same_objects() -> None:
    values: list[Any] = [[1, "two"], Names(a=1), (None,), {}]
    for value in [*values, (torch.ones(2), values)]:
        assert to_device(value, CPU) is value
    (_, same), names = to_device((torch.ones(2), values), META), values[1]
    assert same is values
    assert same[1] is names
