"""States as files: what comes back is what went in, and nothing in them can run."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.training.state_tree import read_tree, write_tree

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.none() | st.booleans()
trees = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(Counter)
    ),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict) and isinstance(other, dict):
        if type(one) is not type(other):
            return False
        pairs = zip(one.items(), other.items(), strict=True)
        return all(type(a[0]) is type(b[0]) and a[0] == b[0] and same(a[1], b[1]) for a, b in pairs)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@given(tree=trees)
def test_plain_values_come_back(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tree")
    write_tree(tree, folder, "state")
    assert same(read_tree(folder, "state"), tree)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, math.nan, -0.0]),
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(12).reshape(3, 4).T,
        torch.get_rng_state(),
        torch.tensor([1 + 2j]),
        torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
    ],
    ids=lambda tensor: f"{tensor.dtype}",
)
def test_tensors_come_back_to_the_bit(tensor: torch.Tensor, tmp_path: Path) -> None:
    shared = {"a": [tensor, (tensor,)], 3: tensor[..., :1] if tensor.ndim else tensor}
    write_tree(shared, tmp_path, "state")
    back = read_tree(tmp_path, "state")
    for one, other in ((tensor, back["a"][0]), (tensor, back["a"][1][0]), (shared[3], back[3])):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        bytes_of = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        assert torch.equal(*bytes_of)
        assert not other.requires_grad


def test_keys_that_read_alike_are_not_mixed_up(tmp_path: Path) -> None:
    one, two, three = torch.ones(1), torch.zeros(1), torch.full((1,), 3.0)
    tree = {1: one, "1": two, "a.b": one, "a": {"b": two, "$tensor": three}}
    write_tree(tree, tmp_path, "state")
    back = read_tree(tmp_path, "state")
    assert [float(back[1]), float(back["1"]), float(back["a.b"])] == [1.0, 0.0, 1.0]
    assert [float(back["a"]["b"]), float(back["a"]["$tensor"])] == [0.0, 3.0]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "builtins.object"),
        ({1, 2}, "builtins.set"),
        (print, "builtin_function"),
        (b"", "bytes"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex128), "tensor of torch.complex128"),
    ],
)
def test_what_has_no_form_is_named_with_its_place(value: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"^state\.here\.1 is a .*{kind}"):
        write_tree({"here": [1, value]}, tmp_path, "state")
