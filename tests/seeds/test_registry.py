"""The registry: what it accepts, what it refuses and how it answers."""

import pytest
import torch
from torch import Tensor, nn

from esper.seeds import BlueprintError, BlueprintRegistry, Family, Seed, blueprints


class LinearSeed(Seed):
    """Adds as many linear maps as it is told to."""

    def __init__(self, dim: int, copies: int = 1) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(copies))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return ()

    def increment(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)


@pytest.fixture
def registry() -> BlueprintRegistry:
    """Return a registry with two transformer blueprints, registered dearest first."""
    made = BlueprintRegistry()

    @made.register("double", family="transformer")
    def _double(dim: int, *, copies: int = 2, heads: int = 1) -> Seed:
        """Two maps.

        More about them.
        """
        return LinearSeed(dim, copies)

    @made.register("single", family=Family.TRANSFORMER)
    def _single(dim: int) -> Seed:
        return LinearSeed(dim)

    return made


def test_names_are_listed_by_family_and_cheapest_first(registry: BlueprintRegistry):
    assert registry.names("transformer") == ("single", "double")
    assert registry.names(Family.CNN) == ()
    for family in Family:
        names = blueprints.names(family)
        costs = [blueprints.param_count(family, name, 64) for name in names]
        assert costs == sorted(costs)
        assert names[0] == "noop"


def test_equal_costs_are_listed_by_name(registry: BlueprintRegistry):
    registry.register("another", family="transformer")(LinearSeed)
    assert registry.names("transformer") == ("another", "single", "double")


def test_a_blueprint_that_refuses_the_usual_width_is_listed_last(registry: BlueprintRegistry):
    @registry.register("thirds", family="transformer")
    def _thirds(dim: int) -> Seed:
        assert dim % 3 == 0, "dim must be divisible by 3"
        return LinearSeed(dim)

    assert registry.names("transformer") == ("single", "double", "thirds")
    assert isinstance(registry.create("transformer", "thirds", 9), LinearSeed)
    with pytest.raises(AssertionError, match="divisible by 3"):
        registry.param_count("transformer", "thirds", 64)


def test_what_was_registered_can_be_read_back(registry: BlueprintRegistry):
    double, single = (registry.get("transformer", name) for name in ("double", "single"))
    assert (double.summary, single.summary) == ("Two maps.", "")
    assert double.options == {"copies": 2, "heads": 1}
    assert list(double.options) == ["copies", "heads"]
    assert (double.needs_heads, single.needs_heads) == (True, False)
    assert not double.supports_checkpointing
    assert not double.copies_host
    assert blueprints.get("cnn", "conv_light").supports_checkpointing
    assert [
        name for name in blueprints.names("cnn") if blueprints.get("cnn", name).copies_host
    ] == ["block"]


def test_options_reach_the_factory(registry: BlueprintRegistry):
    seed = registry.create("transformer", "double", 4, copies=5)
    assert isinstance(seed, LinearSeed)
    assert len(seed.maps) == 5
    assert registry.param_count("transformer", "double", 4, copies=5) == 80
    assert registry.param_count("transformer", "double", 4) == 32


def test_a_name_is_unique_within_its_family_only(registry: BlueprintRegistry):
    version = registry.version
    with pytest.raises(BlueprintError, match=r"'single' of family transformer is already"):
        registry.register("single", family="transformer")(lambda dim: LinearSeed(dim, 9))
    assert registry.version == version
    assert registry.param_count("transformer", "single", 4) == 16
    registry.register("single", family="cnn")(LinearSeed)
    assert registry.names("cnn") == ("single",)


def _without_dim(width: int) -> Seed:
    return LinearSeed(width)


def _dim_by_name(*, dim: int) -> Seed:
    return LinearSeed(dim)


def _many(*dim: int) -> Seed:
    return LinearSeed(dim[0])


def _option_without_default(dim: int, heads: int) -> Seed:
    return LinearSeed(dim, heads)


def _any_option(dim: int, **options: int) -> Seed:
    return LinearSeed(dim, **options)


def _option_by_position(dim: int, heads: int = 2, /) -> Seed:
    return LinearSeed(dim, heads)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: LinearSeed(1), "must take dim as its first parameter"),
        (_without_dim, r"must take dim as its first parameter, got \(width: int\)"),
        (_dim_by_name, "must take dim as its first parameter"),
        (_many, "must take dim as its first parameter"),
        (_option_without_default, "option 'heads' of blueprint 'odd' must .* have a default"),
        (_any_option, "option 'options' of blueprint 'odd' must be passed by name"),
        (_option_by_position, "option 'heads' of blueprint 'odd' must be passed by name"),
    ],
)
def test_a_factory_with_another_signature_is_refused(
    registry: BlueprintRegistry, factory: object, message: str
):
    version = registry.version
    with pytest.raises(BlueprintError, match=message):
        registry.register("odd", family="cnn")(factory)
    assert registry.version == version
    assert registry.names("cnn") == ()


def test_an_unknown_name_family_or_option_is_refused_with_the_nearest(
    registry: BlueprintRegistry,
):
    with pytest.raises(BlueprintError, match=r"did you mean 'single'\? registered: double, single"):
        registry.create("transformer", "singel", 4)
    with pytest.raises(BlueprintError, match=r"no blueprint 'x' in family cnn: registered: none"):
        registry.get("cnn", "x")
    with pytest.raises(
        BlueprintError, match=r"no option 'copes'; did you mean 'copies'\? options: copies, heads"
    ):
        registry.create("transformer", "double", 4, copes=1)
    with pytest.raises(BlueprintError, match=r"no option 'rank'; options: none"):
        registry.param_count("transformer", "single", 4, rank=1)
    for ask in (
        lambda: registry.names("rnn"),
        lambda: registry.register("a", family="rnn"),
        lambda: registry.create("rnn", "a", 4),
    ):
        with pytest.raises(BlueprintError, match=r"unknown family 'rnn'; families: cnn, transform"):
            ask()
    with pytest.raises(BlueprintError, match=r"did you mean 'conv_light'"):
        blueprints.create("cnn", "conv_ligth", 4)


def test_a_width_below_one_and_a_factory_of_something_else_are_refused(
    registry: BlueprintRegistry,
):
    for dim in (0, -4):
        with pytest.raises(ValueError, match=f"dim must be at least 1, got {dim}"):
            registry.create("transformer", "single", dim)

    @registry.register("plain", family="cnn")
    def _plain(dim: int) -> nn.Module:
        return nn.Linear(dim, dim)

    with pytest.raises(BlueprintError, match=r"must return an esper\.seeds\.Seed, got Linear"):
        registry.create("cnn", "plain", 4)


def test_counting_allocates_nothing_and_draws_nothing():
    registry = BlueprintRegistry()
    devices: list[str] = []

    @registry.register("spy", family="cnn")
    def _spy(dim: int) -> Seed:
        torch.randn(3, device="cpu")
        seed = LinearSeed(dim)
        devices.extend(parameter.device.type for parameter in seed.parameters())
        return seed

    before = torch.get_rng_state()
    # 10**14 parameters would take 400 TB.
    assert registry.param_count("cnn", "spy", 10**7) == 10**14
    assert registry.names("cnn") == ("spy",)
    assert devices == ["meta", "meta"]
    assert torch.equal(torch.get_rng_state(), before)
    registry.create("cnn", "spy", 4)
    assert devices[2:] == ["cpu"]
    assert not torch.equal(torch.get_rng_state(), before)


def test_counts_are_kept_until_the_registry_changes():
    registry = BlueprintRegistry()
    built: list[int] = []

    def register(copies: int) -> None:
        @registry.register("one", family="cnn")
        def _one(dim: int) -> Seed:
            built.append(dim)
            return LinearSeed(dim, copies)

    register(1)
    assert [registry.param_count("cnn", "one", 4) for _ in range(3)] == [16, 16, 16]
    assert registry.param_count("cnn", "one", 5) == 25
    assert built == [4, 5]
    registry.unregister("cnn", "one")
    register(3)
    assert registry.param_count("cnn", "one", 4) == 48


def test_counting_what_a_module_becomes_leaves_the_module_as_it_is():
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, 4, 1))

    mine = block(4)
    assert blueprints.param_count("cnn", "block", 4, source=mine) == 8 + 20 + 4
    assert all(module.training for module in mine.modules())
    assert mine[1].inplace
    assert len(mine[0]._forward_pre_hooks) == 0


def test_the_version_changes_with_every_registration_and_removal(registry: BlueprintRegistry):
    versions = [registry.version]
    registry.register("third", family="cnn")(LinearSeed)
    versions.append(registry.version)
    registry.unregister("cnn", "third")
    versions.append(registry.version)
    with registry.temporarily():
        registry.unregister("transformer", "single")
        versions.append(registry.version)
    versions.append(registry.version)
    assert len(set(versions)) == 5
    registry.names("transformer")
    registry.create("transformer", "single", 4)
    assert registry.version == versions[-1]


def test_what_is_changed_temporarily_is_undone_even_after_an_error(registry: BlueprintRegistry):
    names = registry.names("transformer")

    def change_and_fail() -> None:
        with registry.temporarily() as same:
            assert same is registry
            registry.register("guest", family="transformer")(lambda dim: LinearSeed(dim, 0))
            registry.unregister("transformer", "double")
            assert registry.names("transformer") == ("guest", "single")
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        change_and_fail()
    assert registry.names("transformer") == names
    with pytest.raises(BlueprintError, match="no blueprint 'guest'"):
        registry.get("transformer", "guest")


def test_only_what_is_registered_can_be_removed(registry: BlueprintRegistry):
    registry.unregister("transformer", "single")
    with pytest.raises(BlueprintError, match="no blueprint 'single'"):
        registry.unregister("transformer", "single")
