"""Seeds that read what the host gave to the module in front of them."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.learning import Isolation
from esper.seeds import ContextualSeed, Family, Seed, blueprints, zero_initialise_
from esper.slots.call_arguments import CallArguments, refuse_cached_tokens

INPUTS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


class Cache:
    """A key-value cache as far as slots can see."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def get_seq_length(self) -> int:
        return self.tokens


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, tokens: Tensor, memory: Tensor, *, mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        return self.linear(tokens) * mask + memory


class Host(nn.Module):
    """Gives its layer a memory that is learned, a mask and perhaps a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(4))
        self.layer = Layer()
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor, cached_tokens: int | None = None) -> Tensor:
        memory = 2.0 * self.memory
        mask = (tokens.sum(dim=2, keepdim=True) > 0).to(tokens.dtype)
        cache = None if cached_tokens is None else Cache(cached_tokens)
        return self.head(self.layer(tokens, memory, mask=mask, cache=cache))


class ReadingSeed(ContextualSeed):
    """Mixes tokens, and uses all arguments of the call; a cache never comes through."""

    mixes_tokens = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output = zero_initialise_(nn.Linear(dim, dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.output,)

    def increment(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (memory,) = args
        assert kwargs["cache"] is None
        return self.output(features.cumsum(dim=1) * memory) * kwargs["mask"]


@pytest.fixture
def slot() -> Iterator[esper.SeedSlot]:
    """A slot of an isolated reading seed whose output is not zero."""
    with blueprints.temporarily() as registry, torch.random.fork_rng(devices=()):
        torch.manual_seed(0)

        @registry.register("reading", family=Family.TRANSFORMER)
        def _reading(dim: int) -> Seed:
            return ReadingSeed(dim)

        config = SlotConfig(isolation=Isolation.SHADOWING)
        slots = esper.attach(Host(), "layer", example=INPUTS, config=config)
        assert "reading" in [choice.name for choice in slots["layer"].state().choices]
        slots["layer"].germinate("reading")
        nn.init.normal_(slots["layer"].seed.output.weight)
        yield slots["layer"]


def advance_to(slot: esper.SeedSlot, stage: SeedStage) -> None:
    while slot.stage is not stage:
        slot.advance(force=True)


def test_the_arguments_of_each_call_reach_the_seed(slot: esper.SeedSlot):
    host = slot.owner.model
    advance_to(slot, SeedStage.PROBATIONARY)
    tokens = torch.randn(2, 7, 4)
    mask = (tokens.sum(dim=2, keepdim=True) > 0).float()
    memory = 2.0 * host.memory
    features = host.layer.linear(tokens) * mask + memory
    expected = host.head(features + slot.seed.increment(features, memory, mask=mask, cache=None))
    assert torch.equal(host(tokens), expected)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING])
def test_an_isolated_seed_reaches_the_host_through_no_argument(
    slot: esper.SeedSlot, stage: SeedStage
):
    host = slot.owner.model
    advance_to(slot, stage)
    seen: list[Tensor] = []
    run = slot.seed.increment

    def noted(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.extend([features, *args, kwargs["mask"]])
        return run(features, *args, **kwargs)

    slot.seed.increment = noted  # type: ignore[method-assign]
    host(INPUTS).sum().backward()
    assert len(seen) == 3
    assert not any(tensor.requires_grad for tensor in seen)
    assert slot.seed.output.weight.grad is not None


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.PROBATIONARY])
def test_a_reading_seed_is_weighed_with_the_arguments_of_its_own_samples(
    slot: esper.SeedSlot, stage: SeedStage
):
    """With four samples, a memory of four features looks as if it had a row for each."""
    host = slot.owner.model.eval()
    advance_to(slot, stage)
    tokens = torch.randn(4, 5, 4)
    with slot.force_alpha(0.0):
        without = host(tokens)
    with slot.force_alpha(1.0):
        full = host(tokens)
    with slot.force_alpha(torch.tensor([0.0, 1.0, 1.0, 0.0])):
        mixed = host(tokens)
    assert not torch.allclose(full, without)
    torch.testing.assert_close(mixed[1:3], full[1:3])
    torch.testing.assert_close(mixed[::3], without[::3])


def test_tokens_in_a_cache_are_refused_while_the_seed_is_in_the_path(slot: esper.SeedSlot):
    host = slot.owner.model
    advance_to(slot, SeedStage.TRAINING)
    host(INPUTS, cached_tokens=9)
    advance_to(slot, SeedStage.BLENDING)
    host(INPUTS, cached_tokens=5)  # the cache holds these very tokens
    with pytest.raises(RuntimeError, match=r"would not see those in the key-value cache"):
        host(INPUTS, cached_tokens=6)
    advance_to(slot, SeedStage.FOSSILIZED)
    for model in (host, esper.bake(host)):
        model(INPUTS, cached_tokens=5)
        with pytest.raises(RuntimeError, match=r"use_cache=False"):
            model(INPUTS, cached_tokens=6)
    slot.germinate("mlp")
    with pytest.raises(RuntimeError, match=r"use_cache=False"):
        host(INPUTS, cached_tokens=6)


def test_the_first_argument_and_caches_are_left_out():
    call = CallArguments.of_call((INPUTS, Cache(3), 1), {"cache": Cache(4), "mask": INPUTS}, "x")
    assert call.args == (None, 1)
    assert call.kwargs["cache"] is None
    assert call.kwargs["mask"] is INPUTS
    assert call.has_tensors
    assert not CallArguments.of_call((INPUTS,), {"flag": True}, "x").has_tensors
    by_name = CallArguments.of_call((), {"x": INPUTS, "mask": 2}, "x")
    assert (by_name.args, by_name.kwargs) == ((), {"mask": 2})


def test_a_seed_that_changes_its_input_in_place_is_not_built():
    class Overwriting(ReadingSeed):
        def increment(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.output(features.relu_())

    with blueprints.temporarily() as registry:

        @registry.register("overwriting", family=Family.TRANSFORMER)
        def _overwriting(dim: int) -> Seed:
            return Overwriting(dim)

        slots = esper.attach(Host(), "layer", example=INPUTS)
        with pytest.raises(ValueError, match=r"'overwriting' changes its input in place"):
            slots["layer"].germinate("overwriting")
        assert slots["layer"].seed is None


def test_a_copied_block_that_changes_a_mask_in_place_is_not_built():
    class Doubling(Layer):
        def forward(self, tokens: Tensor, memory: Tensor, *, mask: Tensor, cache: Any) -> Tensor:
            return super().forward(tokens, memory, mask=mask.mul_(2.0), cache=cache)

    host = Host()
    host.layer = Doubling()
    slot = esper.attach(host, "layer", example=INPUTS)["layer"]
    given = slot.example_call.kwargs["mask"].clone()
    with pytest.raises(
        ValueError, match=r"'block' changes in place .* besides its input, as a mask"
    ):
        slot.germinate("block", source="own")
    assert torch.equal(slot.example_call.kwargs["mask"], given)


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("isolation", list(Isolation))
def test_a_copied_block_may_fill_what_it_is_given_to_fill(kind: type, isolation: Isolation):
    class Noting(Layer):
        def forward(self, tokens: Tensor, memory: Tensor, *, mask: Tensor, cache: Any) -> Tensor:
            output = super().forward(tokens, memory, mask=mask)
            if isinstance(cache, list):
                cache.append(output.mean())
            else:
                cache["last"] = output
            return output

    class NotingHost(Host):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.layer(tokens, self.memory, mask=tokens[..., :1], cache=kind()))

    host = NotingHost()
    host.layer = Noting()
    slot = esper.attach(host, "layer", example=INPUTS, config=SlotConfig(isolation=isolation))
    slot["layer"].germinate("block", source="own")
    advance_to(slot["layer"], SeedStage.PROBATIONARY)
    host(INPUTS).sum().backward()
    assert not slot["layer"].failed


@dataclass(frozen=True)
class Condition:
    """What a host may hand to its blocks as one."""

    embedding: Tensor


@dataclass(frozen=True, slots=True)
class SlottedCondition:
    """The same without a dictionary."""

    embedding: Tensor


@dataclass(frozen=True)
class HalfSlottedCondition(SlottedCondition):
    """The same with a dictionary, and the tensor beside it."""

    scale: float = 1.0


class AttributeDict(dict[str, Tensor]):
    """The same, by a common idiom, of which any attribute can be asked for."""

    __getattr__ = dict.__getitem__


class Plain:
    """The same as an object of any kind."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding


class SlottedPlain:
    """The same without a dictionary."""

    __slots__ = ("embedding",)

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding


@dataclass
class Holder:
    """The same, one object farther in."""

    held: Any

    @property
    def embedding(self) -> Tensor:
        return self.held.embedding


class PlainHolder(Plain):
    """The same, in a circle."""

    def __init__(self, embedding: Tensor) -> None:
        self.held = Plain(embedding)
        self.held.holders = [self]

    embedding = Holder.embedding


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: Tensor, condition: Any) -> Tensor:
        return tokens + torch.tanh(self.linear(tokens) * condition.embedding)


class ConditionedHost(nn.Module):
    """Gives its block something that is learned, one row per sample, in one of several ways."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.block = Conditioned()
        self.wrap = wrap

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.block(tokens, self.wrap(self.embed(condition)))


@pytest.mark.parametrize(
    "wrap",
    [
        Condition,
        SlottedCondition,
        HalfSlottedCondition,
        lambda e: Holder(Condition(e)),
        lambda e: AttributeDict(embedding=e),
    ],
)
def test_what_is_in_an_argument_is_detached_too(wrap: Callable[[Tensor], Any], bits_of: Any):
    torch.manual_seed(0)
    host, batch = ConditionedHost(wrap), (torch.randn(4, 4), torch.randn(4, 2))
    alone = copy.deepcopy(host)
    config = SlotConfig(isolation=Isolation.TRAINING)
    slot = esper.attach(host, "block", example=batch, config=config)["block"]
    slot.germinate("block", source="own")
    slot.advance(force=True)
    nn.init.ones_(slot.seed.gain.weight)
    for model in (host, alone):
        model(*batch).square().mean().backward()
    assert slot.seed.gain.weight.grad.any()
    with_seed = dict(host.named_parameters())
    for name, parameter in alone.named_parameters():
        assert bits_of(with_seed[name].grad) == bits_of(parameter.grad)


@pytest.mark.parametrize("wrap", [Plain, SlottedPlain, PlainHolder, lambda e: Holder(Plain(e))])
def test_an_argument_that_cannot_be_looked_into_is_refused_behind_the_host(
    wrap: Callable[[Tensor], Any],
):
    host, batch = ConditionedHost(wrap), (torch.randn(4, 4), torch.randn(1, 2))
    config = SlotConfig(isolation=Isolation.TRAINING)
    slot = esper.attach(host, "block", example=batch, config=config)["block"]
    with pytest.raises(ValueError, match=r"reads argument 2, a \w+, whose tensors cannot be det"):
        slot.germinate("block", source="own")
    assert slot.seed is None
    slot.germinate("mlp")  # reads the features alone
    live = ConditionedHost(wrap)
    slots = esper.attach(live, "block", example=batch, config=SlotConfig(isolation="none"))
    slots["block"].germinate("block", source="own")


class Biased(nn.Module):
    """Adds a number to each head of its features, as attention does to its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, bias: Any) -> Tensor:
        bias = bias.embedding if isinstance(bias, Plain) else bias
        heads = tokens.unflatten(-1, (4, 2)).transpose(1, 2)
        if len(bias) == len(heads) * 4:
            bias = bias.unflatten(0, (-1, 4))
        return self.linear((heads + bias).transpose(1, 2).flatten(2))


class BiasedHost(nn.Module):
    def __init__(self, bias: Callable[[int], Any]) -> None:
        super().__init__()
        self.block = Biased()
        self.head = nn.Linear(8, 2)
        self.bias = bias

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(tokens, self.bias(len(tokens))))


@pytest.mark.parametrize(
    ("bias", "batch"),
    [
        (lambda _: torch.ones(4, 3, 1), 4),
        (lambda batch: torch.ones(4 * batch, 3, 1), 6),
        (lambda batch: Plain(torch.ones(batch, 4, 3, 1)), 5),
    ],
    ids=["as many heads as samples", "each sample's heads", "in an object"],
)
def test_a_block_is_copied_whose_call_cannot_be_cut_to_some_samples(
    bias: Callable[[int], Any], batch: int
):
    host, inputs = BiasedHost(bias), torch.randn(batch, 3, 8)
    slot = esper.attach(host, "block", example=inputs)["block"]
    slot.foreseen("block", source="own")
    slot.germinate("block", source="own")
    advance_to(slot, SeedStage.PROBATIONARY)
    host(inputs).sum().backward()
    assert not slot.failed


class Propagating(nn.Module):
    """A layer of a graph's network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.linear(nodes))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.parametrize("order", [("mlp", {}), ("block", {"source": "own"})])
def test_a_seed_grows_where_a_sparse_matrix_is_given(
    order: tuple[str, dict[str, Any]], sparse: Callable[[Tensor], Tensor]
):
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Propagating()
            self.head = nn.Linear(4, 2)

        def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
            return self.head(torch.relu(self.layer(nodes, adjacency)))

    host, example = Graph(), (torch.randn(5, 4), sparse(torch.eye(5)))
    slot = esper.attach(host, "layer", example=example)["layer"]
    assert "mlp" in [choice.name for choice in slot.state().choices]
    blueprint, options = order
    slot.germinate(blueprint, **options)
    advance_to(slot, SeedStage.PROBATIONARY)
    host(*example).sum().backward()
    assert not slot.failed


class StateCache(Cache):
    def get_seq_length(self) -> int:
        raise ValueError("only of attention layers")


def test_caches_of_a_fixed_size_and_of_states_are_refused_by_name(slot: esper.SeedSlot):
    """The one is recognised by the mask, as wide as the cache; the other has no length."""
    advance_to(slot, SeedStage.PROBATIONARY)
    wide = torch.zeros(3, 1, 5, 9)
    layer, memory, mask = slot.owner.model.layer, torch.ones(4), torch.ones(3, 5, 1)
    layer(INPUTS, memory, mask=mask, cache=None)
    for options in ({"mask": mask, "cache": StateCache(0)}, {"mask": wide, "cache": Cache(5)}):
        with pytest.raises(RuntimeError, match=r"use_cache=False"):
            refuse_cached_tokens(INPUTS, (INPUTS, memory), options)
    refuse_cached_tokens(INPUTS, (INPUTS, memory), {"mask": wide, "cache": None})


def test_what_is_kept_of_an_example_is_small_its_own_and_gone_with_the_slot():
    class Skipping(Layer):
        def forward(self, tokens: Tensor, skip: Tensor, mask: Tensor) -> Tensor:
            return self.linear(tokens) + skip

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Skipping()
            self.skip = torch.randn(16, 5, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(tokens, self.skip, torch.ones(5, 5))

    host = Outer()
    slot = esper.attach(host, "layer", example=torch.randn(16, 5, 4))["layer"]
    skip, mask = slot.example_call.args
    assert (skip.shape, mask.shape) == ((2, 5, 4), (5, 5))
    assert skip.untyped_storage().nbytes() == skip.nbytes
    assert skip.data_ptr() != host.skip.data_ptr()
    assert not copy.deepcopy(host).layer.esper_slot.example_call.has_tensors
    esper.detach(host)
    assert not slot.example_call.has_tensors


def test_slots_that_are_called_alike_are_asked_together_what_fits() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))
            self.head = nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                width = 1 if number == 3 else 4
                tokens = layer(tokens, torch.ones(4), mask=torch.ones(1, 5, width))
            return self.head(tokens)

    slots = esper.attach(Stack(), "layers.*", example=INPUTS)
    statistics = slots._fitting.cache
    slots["layers.0"].state()
    one = statistics.misses
    for slot in slots.values():
        slot.state()
    assert statistics.misses == 2 * one, "the last one's mask is of another shape"
