"""One table: what every registered blueprint of both families must do.

Legend: B batch, C channels, H height, W width, T tokens, D features; C and D are `dim`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esper.seeds import Family, Seed, blueprints, scale_output_

REGISTERED = {family: blueprints.names(family) for family in Family}
WIDTHS = (1, 3, 8, 17)
HEAD_WIDTHS = (8, 16)
DEPTH = 3


@contextmanager
def deep_blocks() -> Iterator[None]:
    """Register, for a while, `deep_block` in both families: a seed of several blocks."""

    def transformer(dim: int, *, heads: int | None = None, checkpointing: bool = False) -> Seed:
        """Several transformer blocks."""
        try:
            return blueprints.create(
                Family.TRANSFORMER,
                "block",
                dim,
                depth=DEPTH,
                heads=heads,
                checkpointing=checkpointing,
            )
        except ValueError as error:
            raise ValueError(f"deep_{error}") from error  # under the name that it was asked for

    def cnn(dim: int, *, checkpointing: bool = False) -> Seed:
        """Several residual blocks."""
        return blueprints.create(Family.CNN, "block", dim, depth=DEPTH, checkpointing=checkpointing)

    with blueprints.temporarily() as registry:
        registry.register("deep_block", family=Family.TRANSFORMER)(transformer)
        registry.register("deep_block", family=Family.CNN)(cnn)
        yield


with deep_blocks():
    NAMES = {family: blueprints.names(family) for family in Family}
    BLUEPRINTS = [(family, name) for family in Family for name in NAMES[family]]
    SUPPORTS_CHECKPOINTING = [
        (family, name)
        for family, name in BLUEPRINTS
        if blueprints.get(family, name).supports_checkpointing
    ]
    NEEDS_HEADS = [row for row in BLUEPRINTS if blueprints.get(*row).needs_heads]

every_blueprint = pytest.mark.parametrize(("family", "name"), BLUEPRINTS)
SIZED = [
    (family, name, dim)
    for family, name in BLUEPRINTS
    for dim in (HEAD_WIDTHS if (family, name) in NEEDS_HEADS else WIDTHS)
]
every_width = pytest.mark.parametrize(("family", "name", "dim"), SIZED)
every_width_that_learns = pytest.mark.parametrize(
    ("family", "name", "dim"),
    # A LayerNorm over one feature is constant: nothing behind it can learn.
    [row for row in SIZED if row[1] != "noop" and (row[0] is Family.CNN or row[2] > 1)],
)


@pytest.fixture(autouse=True)
def _with_deep_blocks() -> Iterator[None]:
    with deep_blocks():
        yield


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
        | {"conv_small", "conv_light", "conv_heavy", "block"},
        Family.TRANSFORMER: {"noop", "norm", "lora", "lora_large", "attention"}
        | {"mlp_small", "mlp", "flex_attention", "block"},
    }
    for family, names in expected.items():
        assert set(REGISTERED[family]) == names
    costly = {"depthwise", "bottleneck", "conv_small", "conv_light", "conv_heavy", "block"} | {
        "attention",
        "mlp_small",
        "mlp",
        "flex_attention",
        "deep_block",
    }
    assert {name for _, name in SUPPORTS_CHECKPOINTING} == costly


@every_width
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fresh_seed_returns_its_input_exactly(family: Family, name: str, dim: int, batch: int):
    seed = blueprints.create(family, name, dim)
    shapes = [shape_of(family, batch, dim)]
    if family is Family.TRANSFORMER and not seed.mixes_tokens:
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
    assert (torch.count_nonzero(increment) > 0) == bool(seed.output_layers)
    assert (not seed.output_layers) == (name == "noop")


def cannot_learn(seed: Seed) -> set[str]:
    """Name the parameters whose gradient is zero by mathematics.

    A convolution's bias shifts a whole channel; a GroupNorm with one channel per group takes the
    mean of that channel away again.
    """
    in_front = {f"convolutions.{index}": f"norms.{index}" for index in (0, 1)}
    for block in ("", *(f"blocks.{index}." for index in range(DEPTH))):
        in_front[f"{block}depthwise"] = f"{block}norm"
    modules = dict(seed.named_modules())
    return {
        f"{convolution}.bias"
        for convolution, norm in in_front.items()
        if isinstance(found := modules.get(norm), nn.GroupNorm)
        and found.num_groups == found.num_channels
        and convolution in modules
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

    assert seed.output_layers
    at_output = [parameter for layer in seed.output_layers for parameter in layer.parameters()]
    output = {
        name
        for name, parameter in seed.named_parameters()
        if any(parameter is other for other in at_output)
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
    for layer in twin.output_layers:
        assert any(module is layer for module in twin.modules())


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


@pytest.mark.parametrize("name", NAMES[Family.CNN])
@pytest.mark.parametrize("dim", [3, 8])
def test_channels_last_features_give_the_same_values(name: str, dim: int):
    seed = grown(Family.CNN, name, dim)
    features = torch.randn(shape_of(Family.CNN, 2, dim))
    permuted = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(seed(permuted), seed(features))
    seed.to(memory_format=torch.channels_last)
    torch.testing.assert_close(seed(permuted), seed(features))


@pytest.mark.parametrize("name", [name for name in NAMES[Family.CNN] if name != "noop"])
def test_channels_last_features_without_gradient_give_the_same_gradients(name: str):
    """As an isolated seed meets them; torch's own GroupNorm crashes on a CPU here."""
    seed = grown(Family.CNN, name, 16)
    features = torch.randn(shape_of(Family.CNN, 2, 16))

    def gradients(source: Tensor) -> list[Tensor | None]:
        seed.zero_grad()
        seed.increment(source).square().sum().backward()
        return [parameter.grad for parameter in seed.parameters()]

    permuted = gradients(features.to(memory_format=torch.channels_last))
    torch.testing.assert_close(permuted, gradients(features), rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("name", NAMES[Family.CNN])
@pytest.mark.parametrize("width", [2, 3, 8])
def test_cnn_seed_runs_and_learns_on_a_map_of_one_pixel_at_batch_one(name: str, width: int):
    torch.manual_seed(0)
    seed = blueprints.create(Family.CNN, name, width)
    features = torch.randn(1, width, 1, 1)
    assert torch.equal(seed(features), features)
    for parameter in seed.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if seed.output_layers:
        assert not torch.equal(seed(features), features)


@every_blueprint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_grown_seed_learns_under_autocast(family: Family, name: str, dtype: torch.dtype):
    seed = grown(family, name)
    features = torch.randn(shape_of(family, 2, 8))
    with torch.autocast("cpu", dtype=dtype):
        increment = seed.increment(features)
    tolerance = {"rtol": 0.1, "atol": 0.1 * float(increment.detach().abs().max() + 0.1)}
    torch.testing.assert_close(increment.float(), seed.increment(features), **tolerance)
    if not seed.output_layers:
        return
    increment.float().square().sum().backward()
    for parameter in seed.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@every_blueprint
def test_the_output_layers_scale_the_increment(family: Family, name: str):
    """To first order: exactly, for an increment that is small beside the features."""
    seed = blueprints.create(family, name, 8)
    for layer in seed.output_layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=1e-5)
    features = torch.randn(shape_of(family, 2, 8))
    before = seed.increment(features)
    for layer in seed.output_layers:
        scale_output_(layer, 2.0)
    torch.testing.assert_close(seed.increment(features), 2.0 * before, rtol=1e-2, atol=1e-8)


@every_blueprint
def test_an_exported_seed_gives_the_same_values(family: Family, name: str):
    seed = grown(family, name).eval()
    features = torch.randn(shape_of(family, 2, 8))
    program = torch.export.export(seed, (features,))
    torch.testing.assert_close(program.module()(features), seed(features))


def saved_bytes(seed: Seed, features: Tensor) -> int:
    """Return the bytes that the increment keeps for its backward, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in seed.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        increment = seed.increment(features)
    assert increment.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("family", "name"), SUPPORTS_CHECKPOINTING)
def test_checkpointing_keeps_fewer_bytes_and_changes_no_gradient(family: Family, name: str):
    plain = grown(family, name)
    saving = blueprints.create(family, name, 8, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    features = torch.randn(shape_of(family, 4, 8))
    inputs = (DEPTH if name == "deep_block" else 1) * features.nbytes  # one for each block
    assert saved_bytes(saving, features) <= inputs
    assert saved_bytes(plain, features) > 2 * inputs
    expected = forward_and_backward(plain, plain, features)
    actual = forward_and_backward(saving, saving, features)
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))
    # Nothing is recomputed where nothing is kept.
    saving.eval()
    assert saved_bytes(saving, features) == saved_bytes(plain, features)
    with torch.no_grad():
        assert torch.equal(saving.train().increment(features), plain.increment(features))


@pytest.mark.parametrize(("family", "name"), NEEDS_HEADS)
@pytest.mark.parametrize(("dim", "heads"), [(1, None), (3, None), (17, None), (8, 3), (8, 0)])
def test_a_width_that_heads_do_not_divide_is_refused_before_anything_is_built(
    family: Family, name: str, dim: int, heads: int | None
):
    with torch.random.fork_rng(devices=()):
        before = torch.get_rng_state()
        with pytest.raises(
            ValueError, match=rf"{name}: the width {dim} is not divisible by heads="
        ):
            blueprints.create(family, name, dim, heads=heads)
        assert torch.equal(torch.get_rng_state(), before)
    one_head = blueprints.create(family, name, dim, heads=1)
    features = torch.randn(2, 3, dim)
    assert torch.equal(one_head(features), features)


@pytest.mark.parametrize(("family", "name"), NEEDS_HEADS)
def test_features_without_tokens_are_refused(family: Family, name: str):
    with pytest.raises(ValueError, match="takes features of shape B T D"):
        blueprints.create(family, name, 8)(torch.randn(2, 8))


@pytest.mark.parametrize("name", NAMES[Family.TRANSFORMER])
def test_only_seeds_that_say_so_mix_tokens_and_none_looks_ahead(name: str):
    seed = grown(Family.TRANSFORMER, name)
    features = torch.randn(2, 6, 8)
    changed = features.clone()
    changed[:, 3] += 1.0
    difference = (seed.increment(changed) - seed.increment(features)).abs().amax(dim=(0, 2))
    assert torch.count_nonzero(difference[:3]) == 0
    assert (torch.count_nonzero(difference[4:]) > 0) == seed.mixes_tokens
    if "causal" in blueprints.get(Family.TRANSFORMER, name).options:
        open_seed = blueprints.create(Family.TRANSFORMER, name, 8, causal=False)
        open_seed.load_state_dict(seed.state_dict())
        difference = open_seed.increment(changed) - open_seed.increment(features)
        assert torch.count_nonzero(difference[:, :3]) > 0


def test_what_says_that_it_is_a_linear_map_is_one_or_nearly():
    linear = {row for row in BLUEPRINTS if blueprints.get(*row).linear}
    low_rank = {(Family.TRANSFORMER, "lora"), (Family.TRANSFORMER, "lora_large")}
    assert linear == low_rank | {(family, name) for family in Family for name in ("noop", "norm")}
    for family, name in linear:
        if name == "noop":
            continue
        features = torch.randn(shape_of(family, 256, 8))
        increment = grown(family, name).increment(features).detach()
        rows = [
            (value.movedim(1, -1) if family is Family.CNN else value).reshape(-1, 8)
            for value in (features, increment)
        ]
        inputs = torch.cat([rows[0], torch.ones(len(rows[0]), 1)], dim=1)
        fitted = inputs @ torch.linalg.lstsq(inputs, rows[1]).solution
        unexplained = (rows[1] - fitted).square().sum() / rows[1].var(dim=0).sum() / len(inputs)
        assert unexplained < (1e-6 if (family, name) in low_rank else 0.1), (family, name)
