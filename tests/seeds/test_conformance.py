"""One table: what every registered blueprint of both families must do.

Legend: B batch, C channels, H height, W width, T tokens, D features; C and D are `dim`.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esper.seeds import Family, Seed, blueprints

BLUEPRINTS = [(family, name) for family in Family for name in blueprints.names(family)]
WIDTHS = (1, 3, 8, 17)
HEAD_WIDTHS = (8, 16)
NEEDS_TOKENS = {"attention", "flex_attention"}
"""Transformer blueprints that do not take features of shape `B D`."""

every_blueprint = pytest.mark.parametrize(("family", "name"), BLUEPRINTS)
SIZED = [
    (family, name, dim)
    for family, name in BLUEPRINTS
    for dim in (HEAD_WIDTHS if blueprints.get(family, name).needs_heads else WIDTHS)
]
every_width = pytest.mark.parametrize(("family", "name", "dim"), SIZED)
every_width_that_learns = pytest.mark.parametrize(
    ("family", "name", "dim"),
    # A LayerNorm over one feature is constant: nothing behind it can learn.
    [row for row in SIZED if row[1] != "noop" and (row[0] is Family.CNN or row[2] > 1)],
)


@pytest.fixture(autouse=True)
def _fixed_random_stream() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def shape_of(family: Family, batch: int, dim: int) -> tuple[int, ...]:
    return (batch, dim, 5, 4) if family is Family.CNN else (batch, 6, dim)


def grown(family: Family, name: str, dim: int = 8) -> Seed:
    """Return a seed that has left the identity: every parameter is moved off its birth value."""
    seed = blueprints.create(family, name, dim)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return seed


def test_the_table_covers_the_blueprints_that_are_promised():
    expected = {
        Family.CNN: {"noop", "norm", "attention", "depthwise", "bottleneck"}
        | {"conv_small", "conv_light", "conv_heavy"},
        Family.TRANSFORMER: {"noop", "norm", "lora", "mlp"},
    }
    for family, names in expected.items():
        assert names <= set(blueprints.names(family))


@every_width
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fresh_seed_returns_its_input_exactly(family: Family, name: str, dim: int, batch: int):
    seed = blueprints.create(family, name, dim)
    shapes = [shape_of(family, batch, dim)]
    if family is Family.TRANSFORMER and name not in NEEDS_TOKENS:
        shapes.append((batch, dim))
    for shape in shapes:
        features = 3.0 * torch.randn(shape)
        for training in (True, False):
            seed.train(training)
            assert torch.equal(seed(features), features)
            assert torch.count_nonzero(seed.increment(features)) == 0
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype=dtype):
                    output = seed(features)
                assert output.dtype == features.dtype
                assert torch.equal(output, features)


@every_blueprint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fresh_seed_is_the_identity_in_other_dtypes(
    family: Family, name: str, dtype: torch.dtype
):
    seed = blueprints.create(family, name, 8).to(dtype)
    features = torch.randn(shape_of(family, 2, 8), dtype=dtype)
    assert seed(features).dtype == dtype
    assert torch.equal(seed(features), features)


@every_width
def test_a_grown_seed_keeps_the_shape_and_leaves_its_input_alone(
    family: Family, name: str, dim: int
):
    seed = grown(family, name, dim)
    features = torch.randn(shape_of(family, 1, dim))
    before = features.clone()
    increment = seed.increment(features)
    assert increment.shape == features.shape
    assert torch.isfinite(increment).all()
    assert torch.equal(features, before)
    assert torch.equal(seed(features), features + increment)
    assert (torch.count_nonzero(increment) > 0) == (seed.output_layer is not None)
    assert (seed.output_layer is None) == (name == "noop")


def cannot_learn(seed: Seed) -> set[str]:
    """Name the parameters whose gradient is zero by mathematics.

    A convolution's bias shifts a whole channel; a GroupNorm with one channel per group takes the
    mean of that channel away again.
    """
    norms = {name: module for name, module in seed.named_modules() if name.startswith("norms.")}
    return {
        f"convolutions.{name.removeprefix('norms.')}.bias"
        for name, norm in norms.items()
        if isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels
    }


@every_width_that_learns
def test_after_one_step_the_gradient_reaches_every_parameter(family: Family, name: str, dim: int):
    seed = blueprints.create(family, name, dim).double()
    features = torch.randn(shape_of(family, 16, dim), dtype=torch.float64)
    # Samples far apart from each other keep every ReLU alive for some of them.
    offsets = torch.linspace(-8.0, 8.0, 16, dtype=torch.float64)
    features = features + offsets.reshape(-1, *(1,) * (features.ndim - 1))
    wanted = torch.randn_like(features)

    def backward() -> dict[str, float]:
        seed.zero_grad()
        (seed(features) * wanted).sum().backward()
        return {
            name: 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
            for name, parameter in seed.named_parameters()
        }

    assert isinstance(seed.output_layer, nn.Module)
    output = {
        name
        for name, parameter in seed.named_parameters()
        if any(parameter is other for other in seed.output_layer.parameters())
    }
    first = backward()
    assert all((size > 1e-6) == (name in output) for name, size in first.items())
    torch.optim.SGD(seed.parameters(), lr=0.01).step()
    second = backward()
    unreached = {name for name, size in second.items() if size < 1e-9 * max(second.values())}
    assert unreached == cannot_learn(seed)


class _RefusedCalls(TorchFunctionMode):
    """Notes calls that act in place or on statistics over the batch; a seed makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        in_place = name.endswith("_") and not name.endswith("__")
        over_batch = name in {"batch_norm", "instance_norm"}
        if in_place or over_batch or (kwargs or {}).get("inplace"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@every_blueprint
def test_a_seed_holds_no_batch_statistics_and_changes_nothing_in_place(family: Family, name: str):
    seed = grown(family, name)
    assert list(seed.buffers()) == []
    assert not any(getattr(module, "inplace", False) for module in seed.modules())
    with _RefusedCalls() as calls:
        seed(torch.randn(shape_of(family, 2, 8)))
    assert calls.found == []


@every_blueprint
def test_a_state_dict_makes_a_fresh_seed_the_same_seed(family: Family, name: str):
    seed, other = grown(family, name), blueprints.create(family, name, 8)
    features = torch.randn(shape_of(family, 2, 8))
    other.load_state_dict(seed.state_dict())
    assert torch.equal(other(features), seed(features))
    assert set(seed.state_dict()) == {name for name, _ in seed.named_parameters()}


@every_blueprint
def test_a_deep_copy_acts_the_same_and_shares_nothing(family: Family, name: str):
    seed = grown(family, name)
    features = torch.randn(shape_of(family, 2, 8))
    twin = copy.deepcopy(seed)
    assert torch.equal(twin(features), seed(features))
    expected = seed(features)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(7.0)
    assert torch.equal(seed(features), expected)
    if twin.output_layer is not None:
        assert any(module is twin.output_layer for module in twin.modules())


def forward_and_backward(
    function: Any, seed: Seed, features: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    seed.zero_grad()
    source = features.clone().requires_grad_()
    output = function(source)
    output.square().sum().backward()
    return output.detach(), [source.grad, *(parameter.grad for parameter in seed.parameters())]


@every_blueprint
def test_compiled_in_one_graph_a_seed_gives_the_same_values_and_gradients(
    family: Family, name: str
):
    seed = grown(family, name)
    features = torch.randn(shape_of(family, 2, 8))
    torch.compiler.reset()
    compiled = torch.compile(seed, fullgraph=True, backend="aot_eager")
    output, gradients = forward_and_backward(compiled, seed, features)
    expected_output, expected_gradients = forward_and_backward(seed, seed, features)
    assert torch.equal(output, expected_output)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("name", blueprints.names(Family.CNN))
@pytest.mark.parametrize("dim", [3, 8])
def test_channels_last_features_give_the_same_values(name: str, dim: int):
    seed = grown(Family.CNN, name, dim)
    features = torch.randn(shape_of(Family.CNN, 2, dim))
    permuted = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(seed(permuted), seed(features))
    seed.to(memory_format=torch.channels_last)
    torch.testing.assert_close(seed(permuted), seed(features))


@every_width
def test_the_parameter_count_is_that_of_a_built_seed(family: Family, name: str, dim: int):
    built = sum(
        parameter.numel() for parameter in blueprints.create(family, name, dim).parameters()
    )
    assert blueprints.param_count(family, name, dim) == built
    assert (built == 0) == (name == "noop")


@every_blueprint
def test_counting_and_listing_leave_the_random_stream_where_it_was(family: Family, name: str):
    before = torch.get_rng_state()
    with blueprints.temporarily():
        pass  # forgets cached counts
    blueprints.param_count(family, name, 24)
    blueprints.names(family)
    assert torch.equal(torch.get_rng_state(), before)


@every_blueprint
def test_every_blueprint_says_what_it_is(family: Family, name: str):
    blueprint = blueprints.get(family, name)
    assert (blueprint.family, blueprint.name) == (family, name)
    assert blueprint.summary.endswith(".")


@pytest.mark.parametrize("name", blueprints.names(Family.CNN))
@pytest.mark.parametrize("width", [2, 3, 8])
def test_cnn_seed_runs_and_learns_on_a_map_of_one_pixel_at_batch_one(name: str, width: int):
    torch.manual_seed(0)
    seed = blueprints.create(Family.CNN, name, width)
    features = torch.randn(1, width, 1, 1)
    assert torch.equal(seed(features), features)
    for parameter in seed.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if seed.output_layer is not None:
        assert not torch.equal(seed(features), features)
