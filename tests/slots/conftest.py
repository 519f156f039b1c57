"""Hosts, misbehaving seeds and fingerprints that the tests of slots share.

Legend: B batch, C channels, H height, W width, T tokens, D features.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.lifecycle.events import Event
from esper.lifecycle.stages import SeedStage
from esper.seeds import Family, Seed, blueprints, zero_initialise_
from esper.slots import SeedSlot

WIDTH = 8


class ConvHost(nn.Module):
    """Convolutions with batch norm, an in-place ReLU right behind the first slot, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.block(self.relu(self.norm(self.stem(images))))
        return self.head(self.dropout(features.mean(dim=(2, 3))))


class PerceptronHost(nn.Module):
    """Linear layers; the first slot's features are overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.relu(self.first(features), inplace=True)
        return self.head(self.dropout(F.gelu(self.second(hidden))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 2 * WIDTH)
        self.contract = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = self.queries_keys_values(self.attention_norm(tokens)).chunk(3, -1)
        tokens = tokens + self.dropout(F.scaled_dot_product_attention(queries, keys, values))
        return tokens + self.contract(F.gelu(self.expand(self.mlp_norm(tokens))))


class TokenHost(nn.Module):
    """Two transformer blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(dim=1))


@dataclass(frozen=True)
class HostCase:
    """A host, how to feed it, and where slots go."""

    name: str
    factory: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    targets: tuple[str, ...]
    blueprint: str

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.factory()

    def inputs(self, index: int = 0, *, batch: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn((batch, *self.input_shape), generator=generator)

    def labels(self, index: int = 0, *, batch: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(1_000 + index)
        return torch.randint(0, 3, (batch,), generator=generator)


HOSTS = {
    case.name: case
    for case in (
        HostCase("cnn", ConvHost, (3, 6, 6), ("norm", "block"), "conv_light"),
        HostCase("mlp", PerceptronHost, (6,), ("first", "second"), "mlp"),
        HostCase("tokens", TokenHost, (5, 6), ("blocks.0", "blocks.1"), "mlp"),
    )
}


@pytest.fixture(params=list(HOSTS))
def host(request: pytest.FixtureRequest) -> HostCase:
    """Each of the hosts in turn."""
    return HOSTS[request.param]


@pytest.fixture(scope="session")
def hosts() -> dict[str, HostCase]:
    """All hosts by name."""
    return HOSTS


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attaching, growing or an error could leave a trace in."""
    tree = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = {k: list(v) for k, v in vars(module).items() if k.endswith("hooks") and v}
        tree[name] = (id(module), type(module), module.training, sorted(vars(module)), hooks)
    tensors = {
        name: (id(tensor), tensor.requires_grad, hashlib.sha256(bits(tensor)).hexdigest())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    state = {
        name: hashlib.sha256(bits(tensor)).hexdigest()
        for name, tensor in model.state_dict().items()
    }
    on_gradients = {
        name: (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        for name, parameter in model.named_parameters()
    }
    return {
        "modules": tree,
        "tensors": tensors,
        "state_dict": state,
        "gradient_hooks": on_gradients,
        "random_state": bits(torch.get_rng_state()),
    }


def bits(tensor: Tensor) -> bytes:
    """The tensor's exact bytes, so that -0.0 differs from 0.0 and NaN equals NaN."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[nn.Module], dict[str, Any]]:
    """`fingerprint(model)`, equal for equal models; covers the CPU's random stream."""
    return _fingerprint


@pytest.fixture(scope="session")
def bits_of() -> Callable[[Tensor], bytes]:
    """`bits_of(tensor)`: its exact bytes."""
    return bits


def _advance_to(slot: SeedSlot, stage: SeedStage) -> list[Event]:
    events: list[Event] = []
    for _ in SeedStage:
        if slot.stage is stage:
            return events
        events += slot.advance(force=True)
    raise AssertionError(f"{slot.path} stays {slot.stage}: {events}")


def _grow(slot: SeedSlot, blueprint: str, stage: SeedStage, **options: Any) -> list[Event]:
    return [*slot.germinate(blueprint, **options), *_advance_to(slot, stage)]


@pytest.fixture(scope="session")
def advance_to() -> Callable[..., list[Event]]:
    """`advance_to(slot, stage)`: force the seed, or a pruned slot, there; returns the events."""
    return _advance_to


@pytest.fixture(scope="session")
def grow() -> Callable[..., list[Event]]:
    """`grow(slot, blueprint, stage, **options)`: germinate and force the seed to `stage`."""
    return _grow


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """`randomise(module)`: give every parameter a value that makes its part visible."""

    def fill(module: nn.Module, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                values = torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator)
                parameter.copy_(values)

    return fill


class PointwiseSeed(Seed):
    """A linear map per position behind a hidden layer; the base of the misbehaving seeds."""

    def __init__(self, dim: int, *, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.hidden = nn.Linear(dim, dim)
        self.output = zero_initialise_(nn.Linear(dim, dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.output,)

    def hide(self, features: Tensor) -> Tensor:
        return torch.tanh(self.hidden(features))

    def increment(self, features: Tensor) -> Tensor:
        if not self.channels_first:
            return self.output(self.hide(features))
        last = self.output(self.hide(features.movedim(1, -1)))
        return last.movedim(-1, 1)


class DropoutSeed(PointwiseSeed):
    """Draws random numbers in train mode."""

    def hide(self, features: Tensor) -> Tensor:
        return F.dropout(super().hide(features), 0.5, self.training)


class TurningSeed(PointwiseSeed):
    """Well-behaved for `after` calls, then adds `value` to what it returns."""

    def __init__(self, dim: int, *, channels_first: bool, after: int, value: float) -> None:
        super().__init__(dim, channels_first=channels_first)
        self.after = after
        self.value = value
        self.calls = 0

    def increment(self, features: Tensor) -> Tensor:
        self.calls += 1
        increment = super().increment(features)
        return increment + self.value if self.calls > self.after else increment


class NaNGradientSeed(PointwiseSeed):
    """Finite output, but a root at 0 makes its gradients NaN."""

    def increment(self, features: Tensor) -> Tensor:
        increment = super().increment(features)
        return increment + (increment * 0.0).sqrt()


class RaisingSeed(PointwiseSeed):
    """Well-behaved for `after` calls, then raises."""

    def __init__(self, dim: int, *, channels_first: bool, after: int) -> None:
        super().__init__(dim, channels_first=channels_first)
        self.after = after
        self.calls = 0

    def increment(self, features: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise ArithmeticError("planted failure")
        return super().increment(features)


@pytest.fixture
def test_blueprints() -> Iterator[None]:
    """Register the misbehaving seeds for both families while the test runs.

    pointwise, with_dropout, turns_inf, turns_nan, nan_gradient, raises
    """
    with blueprints.temporarily() as registry:
        for family in Family:
            first = family is Family.CNN

            @registry.register("pointwise", family=family)
            def _pointwise(dim: int, *, _first: bool = first) -> Seed:
                return PointwiseSeed(dim, channels_first=_first)

            @registry.register("with_dropout", family=family)
            def _with_dropout(dim: int, *, _first: bool = first) -> Seed:
                return DropoutSeed(dim, channels_first=_first)

            @registry.register("turns_inf", family=family)
            def _turns_inf(dim: int, *, after: int = 12, _first: bool = first) -> Seed:
                return TurningSeed(dim, channels_first=_first, after=after, value=torch.inf)

            @registry.register("turns_nan", family=family)
            def _turns_nan(dim: int, *, after: int = 12, _first: bool = first) -> Seed:
                return TurningSeed(dim, channels_first=_first, after=after, value=torch.nan)

            @registry.register("nan_gradient", family=family)
            def _nan_gradient(dim: int, *, _first: bool = first) -> Seed:
                return NaNGradientSeed(dim, channels_first=_first)

            @registry.register("raises", family=family)
            def _raises(dim: int, *, after: int = 6, _first: bool = first) -> Seed:
                return RaisingSeed(dim, channels_first=_first, after=after)

        yield
