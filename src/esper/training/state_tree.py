"""States as files or as one tensor: JSON and safetensors, nothing that could run code."""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_MARK = "$"
"""Begins the one key of an object that stands for what JSON has not."""
_TENSOR, _TUPLE, _FLOAT, _PAIRS = "$tensor", "$tuple", "$float", "$pairs"
_COUNTER = "$counter"
_DOCUMENT = "$document"
"""Names the JSON among the tensors, where both are one tensor."""


def tree_files(name: str) -> tuple[str, str]:
    """Return the names of the files that `write_tree` writes."""
    return f"{name}.json", f"{name}.safetensors"


def write_tree(tree: Any, folder: Path, name: str) -> None:
    """Write NAME.json and NAME.safetensors: mappings, lists, tuples, plain values and tensors.

    Keys of mappings may be strings, numbers or None; of mappings only a Counter keeps its kind. A
    tensor that is found at several places, or shares its memory with another, is written for each.

    Raises:
        TypeError: There is something else in it, or a tensor that is not strided or of a dtype that
            safetensors lack; the message says where and what.
        OSError: The folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    document = _json(_encode(tree, name, tensors))
    (folder / f"{name}.json").write_text(document + "\n", encoding="utf-8")
    try:
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    except SafetensorError as error:  # a full disk too
        raise OSError(f"{folder / name}.safetensors: {error}") from error


def read_tree(folder: Path, name: str) -> Any:
    """Return what `write_tree` wrote; tensors are on the CPU.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not what was written.
    """
    document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(folder / f"{name}.safetensors")
    return _decode(document, tensors)


def tree_as_tensor(tree: Any, name: str) -> Tensor:
    """Return what `write_tree` would write, as one tensor of bytes on the CPU.

    Raises:
        TypeError: As `write_tree`; `name` begins the place that the message tells.
    """
    tensors: dict[str, Tensor] = {}
    document = _json(_encode(tree, name, tensors)).encode()
    tensors[_DOCUMENT] = torch.frombuffer(bytearray(document), dtype=torch.uint8)
    return torch.frombuffer(bytearray(safetensors.torch.save(tensors)), dtype=torch.uint8)


def tree_from_tensor(tensor: Tensor) -> Any:
    """Return what `tree_as_tensor` was given; tensors are on the CPU.

    Raises:
        ValueError: It is not what `tree_as_tensor` returned.
    """
    try:
        tensors = safetensors.torch.load(tensor.cpu().numpy().tobytes())
        document = json.loads(tensors[_DOCUMENT].numpy().tobytes())
        return _decode(document, tensors)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"the tensor holds no state: {error}") from error


def _json(document: Any) -> str:
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        _check_plain(value, place)
        name = place if place not in tensors else f"{place}#{len(tensors)}"
        tensors[name] = value.detach().contiguous().cpu().clone()
        return {_TENSOR: name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Counter):  # as a scheduler's milestones
        return {_COUNTER: _encode(dict(value), place, tensors)}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith(_MARK) for key in value)
        items = {key: _encode(item, f"{place}.{key}", tensors) for key, item in value.items()}
        if plain:
            return items
        return {_PAIRS: [[_encode(k, place, tensors), v] for k, v in items.items()]}
    if isinstance(value, (list, tuple)):
        listed = [_encode(v, f"{place}.{index}", tensors) for index, v in enumerate(value)]
        return listed if isinstance(value, list) else {_TUPLE: listed}
    raise TypeError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint "
        "can hold: only mappings, lists, tuples, numbers, strings and tensors"
    )


@functools.cache
def _is_known(dtype: torch.dtype) -> bool:
    """Return whether safetensors can hold tensors of a dtype."""
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, RuntimeError):
        return False
    return True


def _check_plain(tensor: Tensor, place: str) -> None:
    if tensor.layout is not torch.strided or not _is_known(tensor.dtype):
        raise TypeError(
            f"{place} is a tensor of {tensor.dtype} and layout {tensor.layout}, which no "
            "checkpoint can hold; where it is a buffer that can be made again, register it with "
            "persistent=False"
        )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, content),) = value.items()
        if key == _TENSOR:
            return tensors[content]
        if key == _FLOAT:
            return float(content)
        if key == _TUPLE:
            return tuple(_decode(item, tensors) for item in content)
        if key == _COUNTER:
            return Counter(_decode(content, tensors))
        if key == _PAIRS:
            return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    return {key: _decode(item, tensors) for key, item in value.items()}
