"""What the host gave to the module in front of a slot, beyond the features."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.slots.nested import is_record, map_tensors, tensors_in


class CallArguments(NamedTuple):
    """Arguments of a call after the first; key-value caches are left out.

    A cache belongs to the host: a copied block would write its own keys into it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    cut: frozenset[int] = frozenset()
    """Places among its tensors of those that `kept` has taken the first samples of."""

    @classmethod
    def of_call(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], first: str | None
    ) -> "CallArguments":
        """Return what a module was called with, after its first argument.

        Args:
            args: By position.
            kwargs: By name.
            first: Name of the module's first parameter, which may have been passed by name.
        """
        return cls(
            tuple(None if _is_cache(value) else value for value in args[1:]),
            {
                name: None if _is_cache(value) else value
                for name, value in kwargs.items()
                if args or name != first
            },
        )

    @property
    def has_tensors(self) -> bool:
        """Whether a tensor is among them, which belongs to one batch size."""
        return any(True for _ in tensors_in((self.args, self.kwargs)))

    def described(self) -> str:
        """Return what the meta device can tell of the call: all but the values of its tensors."""
        return repr(map_tensors(lambda t: (tuple(t.shape), t.dtype), (self.args, self.kwargs)))

    def detached(self) -> "CallArguments":
        """Return the same with every tensor detached."""
        if not self.args and not self.kwargs:
            return self
        return CallArguments(*map_tensors(Tensor.detach, (self.args, self.kwargs)))

    def as_leaves(self) -> "CallArguments":
        """Return the same of detached tensors that need a gradient where these do.

        A tensor that comes twice comes twice again, and a parameter is one.
        """
        if not self.args and not self.kwargs:
            return self
        leaves: dict[int, Tensor] = {}

        def leaf(tensor: Tensor) -> Tensor:
            if id(tensor) not in leaves:
                values, learns = tensor.detach(), tensor.requires_grad
                leaves[id(tensor)] = (
                    nn.Parameter(values, requires_grad=learns)
                    if isinstance(tensor, nn.Parameter)
                    else values.requires_grad_(learns)
                )
            return leaves[id(tensor)]

        return CallArguments(*map_tensors(leaf, (self.args, self.kwargs)))

    def copied(self) -> "CallArguments":
        """Return the same with a copy of every tensor."""
        return CallArguments(*map_tensors(Tensor.clone, (self.args, self.kwargs)))

    def differs_from(self, others: Sequence[Tensor]) -> bool:
        """Return whether a dense tensor has other values than its copy. Waits for it.

        Args:
            others: Of all tensors, in their order; what holds them may have been filled since.
        """
        pairs = zip(tensors_in(self), others, strict=True)
        return not all(
            bool(torch.isclose(own, its, rtol=0.0, atol=0.0, equal_nan=True).all())
            for own, its in pairs
            if own.layout is torch.strided
        )

    def refuse_opaque(self, path: str) -> None:
        """Raise if `detached` cannot look into an argument that holds tensors with a gradient.

        Args:
            path: Of the slot, for the error.

        Raises:
            ValueError: There is one; each is named by its place or name, with its type.
        """
        named = [*((f"argument {place}", v) for place, v in enumerate(self.args, start=2))]
        named += [(f"argument {name!r}", value) for name, value in self.kwargs.items()]
        opaque = [f"{name}, a {type(value).__name__}" for name, value in named if _hides(value)]
        if opaque:
            raise ValueError(
                f"slot {path!r}: a seed here reads {', '.join(opaque)}, whose tensors cannot be "
                "detached, so that its gradient would reach the host; pass them as tensors, in "
                "tuples, dicts or dataclasses, or set SlotConfig(isolation='none')"
            )

    def to(self, device: torch.device, dtype: torch.dtype) -> "CallArguments":
        """Return the same with every tensor on a device, floating-point ones of a dtype."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return CallArguments(*map_tensors(move, (self.args, self.kwargs)))

    def kept(self, batch: int, samples: int) -> "CallArguments":
        """Return copies on the CPU, of batched tensors the first samples only."""
        places, cut = count(), set()

        def keep(tensor: Tensor) -> Tensor:
            place, dense = next(places), tensor.layout is torch.strided
            if dense and tensor.ndim > 0 and tensor.shape[0] == batch:
                cut.add(place)
                tensor = tensor[:samples]
            return tensor.detach().cpu().clone()

        args, kwargs = map_tensors(keep, (self.args, self.kwargs))
        return CallArguments(args, kwargs, frozenset(cut))

    def with_samples(self, number: int) -> "CallArguments":
        """Return what `kept` returned with so many samples again; those it has come repeatedly."""
        places = count()

        def repeat(tensor: Tensor) -> Tensor:
            if next(places) not in self.cut:
                return tensor
            return tensor[torch.arange(number) % len(tensor)]

        return CallArguments(*map_tensors(repeat, (self.args, self.kwargs)))


NO_ARGUMENTS = CallArguments()

_WITHOUT_CACHE = (
    "a seed here mixes tokens and would not see those in the key-value cache; turn the cache off: "
    "generate(…, use_cache=False), or use_cache=False in the forward"
)


def refuse_cached_tokens(
    features: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise if earlier tokens are in a key-value cache instead of in the features.

    Args:
        features: Shape `B T D`, after the module has run.
        args: What the module was called with.
        kwargs: The same.

    Raises:
        RuntimeError: A cache holds more than these T tokens.
    """
    values = (*args, *kwargs.values())
    tokens = features.shape[1]
    caches = [value for value in values if _is_cache(value)]
    if not caches:
        return
    beyond = any(_cached_tokens(cache) > tokens for cache in caches)
    # The mask of a cache of fixed size is as wide as the cache.
    beyond = beyond or any(
        isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] > tokens
        for value in values
    )
    if beyond:
        raise RuntimeError(_WITHOUT_CACHE)


def _cached_tokens(cache: Any) -> int:
    try:
        count: int = cache.get_seq_length()
    except ValueError as error:  # a cache of states rather than of tokens
        raise RuntimeError(_WITHOUT_CACHE) from error
    return count


def _is_cache(value: Any) -> bool:
    return hasattr(type(value), "get_seq_length")  # of a value it may be one of its keys


_NOT_LOOKED_INTO = (Tensor, nn.Module, type, ModuleType)


def _hides(value: Any) -> bool:
    """Return whether an object that is no container holds floating-point tensors, however far in.

    Modules, whose parameters are leaves, classes, and Python's own modules are not looked into.
    """
    waiting: list[tuple[Any, bool]] = [(value, False)]
    seen: dict[tuple[int, bool], Any] = {}  # what was made here stays, or its id comes again
    while waiting:
        item, hidden = waiting.pop()
        if isinstance(item, Tensor) and hidden and item.is_floating_point():
            return True
        if (id(item), hidden) in seen or isinstance(item, _NOT_LOOKED_INTO):
            continue
        seen[id(item), hidden] = item
        if isinstance(item, (tuple, list)):
            parts: Iterable[Any] = item
        elif isinstance(item, Mapping):
            parts = item.values()
        else:
            hidden = hidden or not is_record(item)
            parts = [object.__getstate__(item)]  # its dictionary, its slots, or both
        waiting += [(part, hidden) for part in parts]
    return False
