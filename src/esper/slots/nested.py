"""Tensors in nested tuples, lists, mappings and dataclasses, as modules take and return them."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return the value with every tensor in its containers, dataclasses too, replaced."""
    if isinstance(value, Tensor):
        return function(value)
    return _rebuilt(value, lambda item: map_tensors(function, item))


def _rebuilt(value: Any, part: Callable[[Any], Any]) -> Any:
    """Return a container with `part` of each of its items, and anything else as it is."""
    if isinstance(value, dict) and type(value) is not dict:
        rebuilt = copy.copy(value)  # of its own kind, as one whose keys are attributes
        for key, item in value.items():
            rebuilt[key] = part(item)
        return rebuilt
    if isinstance(value, Mapping):
        return {key: part(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [part(item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if is_record(value):
        kind: Any = type(value)
        rebuilt = kind.__new__(kind)  # copy() fails at a frozen one's slots
        for name, item in _attributes(value).items():
            object.__setattr__(rebuilt, name, part(item))  # a frozen one too
        return rebuilt
    return value


def is_record(value: Any) -> bool:
    """Return whether a value is a dataclass's."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _attributes(record: Any) -> dict[str, Any]:
    """Return a dataclass's fields, which may be slots, and what it has besides."""
    names = [field.name for field in dataclasses.fields(record)]
    fields = {name: getattr(record, name) for name in names if hasattr(record, name)}
    return {**fields, **getattr(record, "__dict__", {})}


def to_device(value: Any, device: torch.device | None) -> Any:
    """Return the value with every tensor in it on the device; None leaves it as it is.

    What is there already is returned as it is. A value with a `to` of its own, as a batch of a
    library, is asked to move itself; other containers are rebuilt as `map_tensors` does. Waits for
    copies from pinned memory to a GPU no more than other work on that GPU does.
    """
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type == "cuda")
    if callable(getattr(value, "to", None)):
        tensors = list(tensors_in(value))  # none in a batch that cannot be looked into
        there = bool(tensors) and all(tensor.device == device for tensor in tensors)
        return value if there else value.to(device)
    changed = False

    def moved(item: Any) -> Any:
        nonlocal changed
        there = to_device(item, device)
        changed |= there is not item
        return there

    rebuilt = _rebuilt(value, moved)
    return rebuilt if changed else value


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in the value's tuples, lists, mappings and dataclasses."""
    return [leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor)]


def leaves_in(value: Any) -> list[Any]:
    """Return all there is in the value's tuples, lists, mappings and dataclasses."""
    found: list[Any] = []
    _collect_leaves(value, found)
    return found


def _collect_leaves(value: Any, found: list[Any]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):  # asked first: of a mapping it takes longer
        for item in value:
            _collect_leaves(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect_leaves(item, found)
    elif is_record(value):
        for item in _attributes(value).values():
            _collect_leaves(item, found)
    else:
        found.append(value)


def replace_first(output: Any, features: Tensor) -> Any:
    """Return a module's output with its features, the tensor or the first element, replaced."""
    if isinstance(output, Tensor):
        return features
    rest = output[1:]
    if hasattr(output, "_fields"):
        return type(output)(features, *rest)
    return type(output)((features, *rest))
