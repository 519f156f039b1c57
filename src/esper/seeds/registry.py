"""The registry of blueprints: what can grow, by family and name."""

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from typing import TypeVar

import torch
from cachetools import LRUCache
from torch import nn

from esper.seeds.graph_free_copy import graph_free_copy
from esper.seeds.normalization import make_group_norms_safe
from esper.seeds.seed import Seed

ENTRY_POINT_GROUP = "esper.blueprints"
"""Third-party packages name here a module, or a callable, that registers blueprints."""

_COST_DIM = 64
_MAX_CACHED_COUNTS = 512

FactoryT = TypeVar("FactoryT", bound=Callable[..., Seed])


class Family(StrEnum):
    """How features are laid out."""

    CNN = "cnn"
    """`B C H W`."""
    TRANSFORMER = "transformer"
    """Features in the last dimension: `B D` or `B T D`."""


class BlueprintError(ValueError):
    """An unknown blueprint or option, or a registration that contradicts another."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A way to build a seed."""

    name: str
    family: Family
    factory: Callable[..., Seed]
    """Takes the width `dim` and keyword options."""
    linear: bool = False
    """Whether it computes a linear map of the features, or nearly: behind a module that is trained
    itself the default gates refuse it."""

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, object]:
        """Option names with their defaults, in the factory's order."""
        parameters = list(inspect.signature(self.factory).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    @property
    def supports_checkpointing(self) -> bool:
        """Whether it has an option `checkpointing`, which recomputes activations."""
        return "checkpointing" in self.options

    @property
    def needs_heads(self) -> bool:
        """Whether it has an option `heads`, which must divide the width."""
        return "heads" in self.options

    @property
    def copies_host(self) -> bool:
        """Whether it has an option `source`, for which slots pass a copy of a host's module."""
        return "source" in self.options


class BlueprintRegistry:
    """Blueprints by family and name; the pair is unique."""

    def __init__(self, *, entry_point_group: str | None = None) -> None:
        self._blueprints: dict[tuple[Family, str], Blueprint] = {}
        self._counts: LRUCache[Hashable, int] = LRUCache(_MAX_CACHED_COUNTS)
        self._pending_group = entry_point_group
        self._version = 0

    @property
    def version(self) -> int:
        """Changes with every registration, so that derived action spaces can refresh."""
        return self._version

    def register(
        self, name: str, *, family: Family | str, linear: bool = False
    ) -> Callable[[FactoryT], FactoryT]:
        """Return a decorator that registers a factory `(dim, **options) -> Seed`.

        Args:
            name: Of the blueprint, in its family.
            family: How the features that it fits are laid out.
            linear: Whether seeds of it compute a linear map of the features, or nearly.

        Raises:
            BlueprintError: The family is unknown, the pair is taken, the factory's first
                parameter is not `dim`, or an option cannot be passed by name or has no default.
        """
        known_family = _family(family)

        def decorate(factory: FactoryT) -> FactoryT:
            key = (known_family, name)
            if key in self._blueprints:
                raise BlueprintError(
                    f"blueprint {name!r} of family {known_family} is already registered; "
                    "choose another name"
                )
            _check_signature(name, factory)
            self._blueprints[key] = Blueprint(
                name=name,
                family=known_family,
                factory=factory,
                linear=linear,
            )
            self._changed()
            return factory

        return decorate

    def get(self, family: Family | str, name: str) -> Blueprint:
        """Return one blueprint.

        Raises:
            BlueprintError: The family or the name is unknown; the nearest names are listed.
        """
        self._load_plugins()
        known_family = _family(family)
        found = self._blueprints.get((known_family, name))
        if found is None:
            names = [other for kind, other in self._blueprints if kind is known_family]
            nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
            raise BlueprintError(
                f"no blueprint {name!r} in family {known_family}: {hint}"
                f"registered: {', '.join(sorted(names)) or 'none'}"
            )
        return found

    def names(self, family: Family | str) -> tuple[str, ...]:
        """Return the names of one family, cheapest first (parameters at width 64).

        A blueprint that cannot be built at that width comes last.
        """
        self._load_plugins()
        known_family = _family(family)
        names = [name for kind, name in self._blueprints if kind is known_family]
        costs = {name: self._cost(known_family, name) for name in names}
        return tuple(sorted(names, key=lambda name: (costs[name], name)))

    def create(self, family: Family | str, name: str, dim: int, **options: object) -> Seed:
        """Build a fresh seed of width `dim`.

        Effects: consumes the default random stream; slots wrap this in a forked one.

        Raises:
            BlueprintError: Family, name or an option is unknown, or the factory returned
                something that is not a Seed.
            ValueError: `dim` is below 1, or the factory refuses an option's value.
        """
        blueprint = self.get(family, name)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self._check_options(blueprint, options)
        seed = blueprint.factory(dim, **options)
        if not isinstance(seed, Seed):
            raise BlueprintError(
                f"the factory of blueprint {name!r} must return an esper.seeds.Seed, "
                f"got {type(seed).__name__}"
            )
        make_group_norms_safe(seed)
        return seed

    def param_count(self, family: Family | str, name: str, dim: int, **options: object) -> int:
        """Return the number of parameters, built on the meta device: no memory is allocated.

        A module among the options is copied, and stays as it is.

        Raises:
            BlueprintError: As `create`.
        """
        key = (_family(family), name, dim, repr(sorted(options.items())))
        own = any(isinstance(value, nn.Module) for value in options.values())
        cached = None if own else self._counts.get(key)
        if cached is None:
            with torch.random.fork_rng(devices=()), torch.device("meta"):
                # A blueprint takes a module over and changes it, and the caller's is to stay.
                seed = self.create(family, name, dim, **graph_free_copy(options))
            cached = sum(parameter.numel() for parameter in seed.parameters())
            if not own:  # a module's repr does not tell how large it is
                self._counts[key] = cached
        return cached

    @contextmanager
    def temporarily(self) -> Iterator["BlueprintRegistry"]:
        """Undo every registration and removal made inside the block."""
        self._load_plugins()
        before = dict(self._blueprints)
        try:
            yield self
        finally:
            self._blueprints = before
            self._changed()

    def unregister(self, family: Family | str, name: str) -> None:
        """Remove a blueprint.

        Raises:
            BlueprintError: It is not registered.
        """
        del self._blueprints[(self.get(family, name).family, name)]
        self._changed()

    def _cost(self, family: Family, name: str) -> float:
        try:
            return self.param_count(family, name, _COST_DIM)
        except Exception:  # noqa: BLE001 - one blueprint must not hide the others; create() tells
            return math.inf

    def _changed(self) -> None:
        self._version += 1
        self._counts.clear()

    def _load_plugins(self) -> None:
        group, self._pending_group = self._pending_group, None
        if group is None:
            return
        for entry_point in entry_points(group=group):
            try:
                loaded = entry_point.load()
                if callable(loaded):
                    loaded()
            except Exception as error:  # noqa: BLE001 - it must not take the library with it
                warnings.warn(
                    f"blueprint plug-in {entry_point.name!r} ({entry_point.value}) was not loaded: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )

    @staticmethod
    def _check_options(blueprint: Blueprint, options: dict[str, object]) -> None:
        for option in options:
            if option not in blueprint.options:
                known = ", ".join(blueprint.options) or "none"
                nearest = difflib.get_close_matches(option, blueprint.options, n=1)
                hint = f" did you mean {nearest[0]!r}?" if nearest else ""
                raise BlueprintError(
                    f"blueprint {blueprint.name!r} of family {blueprint.family} has no option "
                    f"{option!r};{hint} options: {known}"
                )


def _check_signature(name: str, factory: Callable[..., Seed]) -> None:
    signature = inspect.signature(factory)
    dim, *options = signature.parameters.values() or (None,)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if dim is None or dim.name != "dim" or dim.kind not in by_position:
        raise BlueprintError(
            f"the factory of blueprint {name!r} must take dim as its first parameter, "
            f"got {signature}"
        )
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for option in options:
        if option.kind not in by_name or option.default is inspect.Parameter.empty:
            raise BlueprintError(
                f"option {option.name!r} of blueprint {name!r} must be passed by name and have a "
                f"default, got {signature}"
            )


def _family(family: Family | str) -> Family:
    try:
        return Family(family)
    except ValueError:
        known = ", ".join(member.value for member in Family)
        raise BlueprintError(f"unknown family {family!r}; families: {known}") from None


blueprints = BlueprintRegistry(entry_point_group=ENTRY_POINT_GROUP)
"""The registry that slots, the command line and policies use."""
