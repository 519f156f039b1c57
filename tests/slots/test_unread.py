"""Attaching behind what nobody reads is refused, and never where somebody may read it."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper

INPUTS = torch.randn(3, 5, 4)


class Reader(nn.Module):
    """Returns what `read` makes of itself, of its first layer's features, and of its second's."""

    def __init__(self, read: Callable[["Reader", Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(4, 8)
        self.read = read
        self.seen: list[Tensor] = []
        self.register_buffer("last", torch.zeros(3, 5, 8))

    def forward(self, inputs: Tensor) -> Any:
        return self.read(self, self.first(inputs), self.second(inputs))


class Recurrent(nn.Module):
    """Classifies by an RNN's last state, or by all of its outputs."""

    def __init__(self, rnn: nn.Module, *, by_state: bool) -> None:
        super().__init__()
        self.rnn = rnn
        self.by_state = by_state
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, state = self.rnn(inputs)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(hidden[-1] if self.by_state else outputs[:, -1])


@pytest.mark.parametrize("by_state", [True, False])
@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU])
def test_an_rnn_takes_a_slot_where_its_outputs_are_read(rnn: Any, by_state: bool) -> None:
    model = Recurrent(rnn(4, 8, batch_first=True), by_state=by_state)
    told = r"'rnn' ran on the example, and nobody read .* the first element of it"
    with pytest.raises(ValueError, match=told) if by_state else nullcontext():
        esper.attach(model, "rnn", example=INPUTS)
    assert hasattr(model.rnn, "esper_slot") is not by_state


@pytest.mark.parametrize("place", ["first", ["second", "first"]])
def test_the_place_that_nobody_reads_is_named_and_no_slot_is_left(place: Any) -> None:
    model = Reader(lambda host, features, output: output)
    with pytest.raises(ValueError, match="'first' ran on the example, and nobody read"):
        esper.attach(model, place, example=INPUTS)
    assert len(list(model.modules())) == 3
    esper.attach(model, "second", example=INPUTS)


class Opaque:
    """An output of a class that nobody knows."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


def doubled(features: dict[str, Tensor]) -> Tensor:
    return 2.0 * features["features"]


def in_script(host: Reader, features: Tensor, output: Tensor) -> Tensor:
    """As an extension in C++ has it, of whose calls Python sees nothing."""
    with torch.no_grad():
        twice = torch.jit.script(doubled)({"features": features})
    return output + twice


def without_gradient(host: Reader, features: Tensor, output: Tensor) -> Tensor:
    with torch.no_grad():
        return output + features


def by_gradient(host: Reader, features: Tensor, output: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = features.detach().requires_grad_()
        return output + torch.autograd.grad(leaf.square().sum(), leaf)[0]


def in_attribute(host: Reader, features: Tensor, output: Tensor) -> Tensor:
    host.penalty = features
    return output


def in_list(host: Reader, features: Tensor, output: Tensor) -> Tensor:
    host.seen.append(features)
    return output


def into_buffer(host: Reader, features: Tensor, output: Tensor) -> Tensor:
    host.last.copy_(features)
    return output


READ: dict[str, Callable[[Reader, Tensor, Tensor], Any]] = {
    "returned": lambda host, f, output: {"logits": output, "hidden": [f]},
    "returned in an object": lambda host, f, output: (output, Opaque(f)),
    "returned as integers": lambda host, f, output: f.argmax(-1),
    "returned in training": lambda host, f, output: (output, f) if host.training else output,
    "returned in evaluation": lambda host, f, output: output if host.training else (output, f),
    "returned as a number": lambda host, f, output: (output, float(f.mean())),
    "deciding": lambda host, f, output: output if f.mean() > 0.0 else -output,
    "detached": lambda host, f, output: output + f.detach(),
    "without gradient": without_gradient,
    "by a gradient": by_gradient,
    "by NumPy": lambda host, f, output: output + torch.from_numpy(f.detach().numpy()),
    "in a script": in_script,
    "recomputed": lambda host, f, output: output + checkpoint(torch.tanh, f, use_reentrant=False),
    "reentrantly": lambda host, f, output: output + checkpoint(torch.tanh, f, use_reentrant=True),
    "kept in an attribute": in_attribute,
    "kept in a list": in_list,
    "written into a buffer": into_buffer,
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_read_in_any_way_takes_a_slot(read: str, frozen: bool) -> None:
    model = Reader(READ[read]).requires_grad_(not frozen)
    esper.attach(model, "first", example=INPUTS)


@pytest.mark.parametrize("read", [in_list, into_buffer])
def test_attaching_leaves_no_graph_in_what_the_host_keeps(read: Any) -> None:
    model = Reader(read)
    esper.attach(model, "first", example=INPUTS)
    assert not any(tensor.requires_grad for tensor in [model.last, *model.seen])
    copy.deepcopy(model)


def test_a_host_that_refuses_gradients_where_it_evaluates_takes_a_slot() -> None:
    def read(host: Reader, features: Tensor, output: Tensor) -> Tensor:
        assert host.training or not torch.is_grad_enabled()
        return output + features

    esper.attach(Reader(read), "first", example=INPUTS)


def test_attaching_warns_of_no_number_that_the_host_reads() -> None:
    def read(_: Reader, features: Tensor, output: Tensor) -> Tensor:
        return output * float(features.mean())

    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            esper.attach(Reader(read), "first", example=INPUTS)
    finally:
        torch.set_warn_always(False)
    assert not told
