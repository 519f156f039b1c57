"""A learned policy on disk: one safetensors file, weights and what they mean, nothing that runs."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from esper.lifecycle.record import Record
from esper.policies.learned.action_coder import SLOT_OPERATIONS, ActionChoices, Head
from esper.policies.learned.features import RUN_FEATURES, SLOT_FEATURES, ObservationConfig
from esper.policies.learned.network import GrowthNetwork, NetworkConfig
from esper.policies.named import POLICY_FILE_SUFFIX, is_policy_file

FORMAT_VERSION = 2
_KEY = "esper_policy"
"""Names the document among the file's metadata."""
_HEADER_LENGTH_BYTES = 8
_DTYPE = torch.float32
"""Of weights in a file."""
_NAMED = 5
"""How many names an error tells."""


class PolicyFileError(ValueError):
    """A file that this version cannot take a policy from."""


class PolicyDocument(Record):
    """Everything of a learned policy but its weights."""

    format_version: int = FORMAT_VERSION
    run_features: tuple[str, ...] = tuple(RUN_FEATURES)
    slot_features: tuple[str, ...] = tuple(SLOT_FEATURES)
    heads: tuple[str, ...] = tuple(head.name for head in Head)
    operations: tuple[str, ...] = SLOT_OPERATIONS
    """What may be asked of a slot, in the order of the operation head."""
    observation: ObservationConfig
    choices: ActionChoices
    blueprints: tuple[str, ...]
    """Names met in training, in the order of their embeddings."""
    network: NetworkConfig
    trained_on: dict[str, JsonValue]
    """For people: tasks, seeds, steps, returns."""


@dataclass(frozen=True, kw_only=True)
class SavedPolicy:
    """What a file holds."""

    network: GrowthNetwork
    observation: ObservationConfig
    trained_on: Mapping[str, JsonValue]
    sha256: str
    """Of the whole file."""


def save_policy(
    path: str | Path,
    network: GrowthNetwork,
    *,
    observation: ObservationConfig | None = None,
    trained_on: Mapping[str, JsonValue] | None = None,
) -> str:
    """Write a policy, whole or not at all; a file that stands there is replaced.

    Args:
        path: Ends in `.safetensors`; missing folders are created.
        network: Its weights are written as they are now, in single precision.
        observation: What it was trained to look at.
        trained_on: For people, in plain values.

    Returns:
        The SHA-256 of the file.

    Raises:
        ValueError: The path ends otherwise, or a weight is not finite; nothing is written.
        OSError: The file cannot be written; what stood there stays.
    """
    path = Path(path)
    if not is_policy_file(path.name):
        raise ValueError(f"a policy is kept as NAME{POLICY_FILE_SUFFIX}, and this is {path}")
    weights = {
        name: weight.detach().to("cpu", _DTYPE, copy=True).contiguous()
        for name, weight in network.state_dict().items()
    }
    _check_finite(weights, "the network to save")
    document = PolicyDocument(
        observation=observation or ObservationConfig(),
        choices=network.choices,
        blueprints=network.blueprints,
        network=network.config,
        trained_on=dict(trained_on or {}),
    )
    text = json.dumps(document.model_dump(mode="json"), sort_keys=True)
    data = safetensors.torch.save(weights, {_KEY: text})
    _replace(path, data)
    return hashlib.sha256(data).hexdigest()


def load_policy(path: str | Path) -> SavedPolicy:
    """Read a policy, on the CPU.

    Raises:
        PolicyFileError: The file cannot be read, is no safetensors file, or holds no policy; it is
            of another format, or of other features, heads or operations than this version's; a
            weight is missing, of another shape or dtype, not finite, or one too many.

    Effects:
        None on torch's random stream.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PolicyFileError(f"there is no policy file {path}") from error
    except OSError as error:
        raise PolicyFileError(f"the policy file {path} cannot be read: {error}") from error
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise PolicyFileError(f"{path} is no safetensors file, or damaged: {error}") from error
    document = _document(data, path)
    network = _network(weights, document, path)
    return SavedPolicy(
        network=network,
        observation=document.observation,
        trained_on=document.trained_on,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _document(data: bytes, path: Path) -> PolicyDocument:
    """Read the document out of the header, which safetensors has found valid."""
    length = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
    header = json.loads(data[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
    text = header.get("__metadata__", {}).get(_KEY)
    if text is None:
        raise PolicyFileError(
            f"{path} holds tensors, and no Esper policy; one is written by "
            "esper.policies.learned.save_policy"
        )
    try:
        raw = json.loads(text)
        version = raw["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PolicyFileError(f"{path} says nothing legible about its policy: {error}") from error
    if version != FORMAT_VERSION:
        raise PolicyFileError(
            f"{path} has format version {version!r}; this esper reads version {FORMAT_VERSION}"
        )
    for noun, known in (
        ("run_features", list(RUN_FEATURES)),
        ("slot_features", list(SLOT_FEATURES)),
        ("heads", [head.name for head in Head]),
        ("operations", [str(operation) for operation in SLOT_OPERATIONS]),
    ):
        _check_names(noun.replace("_", " "), raw.get(noun), known, path)
    try:
        return PolicyDocument.from_dump(raw)
    except ValidationError as error:
        raise PolicyFileError(f"{path} describes no policy that esper knows: {error}") from error
    except ValueError as error:  # fields are missing
        raise PolicyFileError(f"{path} describes its policy in part: {error}") from error


def _check_names(noun: str, stored: Any, known: Sequence[str], path: Path) -> None:
    if stored == known:
        return
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise PolicyFileError(f"{path} does not tell the {noun} of its policy")
    beyond = [name for name in stored if name not in known]
    lacking = [name for name in known if name not in stored]
    differs = f"it has {_some(beyond)} beyond, and lacks {_some(lacking)}"
    if not (beyond or lacking):
        differs = "they are in another order"
    raise PolicyFileError(
        f"{path} was made with other {noun} than this esper's: {differs}; train it anew, or use "
        "the esper that made it"
    )


def _network(weights: dict[str, Tensor], document: PolicyDocument, path: Path) -> GrowthNetwork:
    try:
        with torch.device("meta"):  # a file may describe any width; nothing is allocated for it
            described = GrowthNetwork(document.blueprints, document.choices, document.network)
        expected = described.to(_DTYPE).state_dict()  # whatever torch's default is
    except (ValueError, RuntimeError, TypeError) as error:  # TypeError: no integer of torch's
        raise PolicyFileError(f"{path} describes no network: {error}") from error
    beyond, lacking = weights.keys() - expected.keys(), expected.keys() - weights.keys()
    if beyond or lacking:
        raise PolicyFileError(
            f"the weights in {path} are not those of its network: {_some(sorted(beyond))} beyond, "
            f"{_some(sorted(lacking))} lacking"
        )
    for name, weight in expected.items():
        stored = weights[name]
        if (stored.shape, stored.dtype) != (weight.shape, weight.dtype):
            raise PolicyFileError(
                f"{name} in {path} is {tuple(stored.shape)} {stored.dtype}, and should be "
                f"{tuple(weight.shape)} {weight.dtype}"
            )
    try:
        _check_finite(weights, str(path))
    except ValueError as error:
        raise PolicyFileError(str(error)) from error
    return GrowthNetwork.of_weights(
        weights, document.blueprints, document.choices, document.network
    )


def _check_finite(weights: Mapping[str, Tensor], place: str) -> None:
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"{place} has weights that are not finite, in {_some(broken)}; its training diverged"
        )


def _some(names: Sequence[str]) -> str:
    told = ", ".join(names[:_NAMED]) or "nothing"
    return told if len(names) <= _NAMED else f"{told} and {len(names) - _NAMED} more"


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
