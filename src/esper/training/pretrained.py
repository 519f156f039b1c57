"""Grown models on disk: safetensors and JSON, the same topology in a fresh process."""

import functools
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from esper.lifecycle.record import Record
from esper.lifecycle.stages import SeedStage
from esper.seeds.registry import Family
from esper.slots.attach import attach
from esper.slots.committed_seed import CommittedSeed
from esper.slots.config import SlotConfig
from esper.slots.placement import remove_slots
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.slots.slot_snapshot import LifeSnapshot, SlotSnapshot
from esper.slots.undecided import refuse_undecided
from esper.telemetry.run_folder import DATABASE_FILE, GROWN_FOLDER, RunFolderError
from esper.training.carried_state import KEY
from esper.training.sealed_folder import DamagedFolderError, check_sealed, sealed_folder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1


class SavedSlot(Record):
    """One slot with what grew in it."""

    family: Family
    dim: int
    config: SlotConfig
    committed: tuple[CommittedSeed, ...]


class PretrainedConfig(Record):
    """Everything of a grown model but its weights and its host's code."""

    format_version: int = FORMAT_VERSION
    host: str
    """Class of the host, for people; any module with the same paths and weights will do."""
    slots: dict[str, SavedSlot]


def save_pretrained(slots: SlotSet, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a grown model into a new folder: weights of host and committed seeds, and topology.

    Args:
        slots: From `esper.attach`; their model is saved.
        folder: Is created, whole or not at all.
        overwrite: Replace what stands there.

    Raises:
        FileExistsError: The folder exists and `overwrite` is not set.
        DamagedFolderError: What is to be replaced is damaged; remove it, or choose another folder.
        ValueError: A living seed is in the forward path; the message says how to keep or remove it.
            Or the model is sharded.
        TypeError: The state dict holds something that is no tensor, a sparse one, or one of a dtype
            that safetensors has not.
        pydantic_core.PydanticSerializationError: An option of a committed seed has no JSON form.
        In each case nothing is written.
    """
    if not isinstance(slots, SlotSet):
        raise TypeError(
            "save_pretrained takes the slots that esper.attach returned, got "
            f"{type(slots).__name__}"
        )
    if slots.sharded:
        raise ValueError(
            "the model is sharded over several processes; keep the run with esper.training."
            "Checkpoints, let one process go on from that, and save there"
        )
    refuse_undecided(slots.values(), "saving")
    config = PretrainedConfig(
        host=type(slots.model).__name__,
        slots={
            path: SavedSlot(
                family=slot.family,
                dim=slot.dim,
                config=slot.config,
                committed=tuple(slot.committed),
            )
            for path, slot in slots.items()
        },
    )
    text = json.dumps(config.model_dump(mode="json"), indent=2)
    with sealed_folder(Path(folder), overwrite=overwrite) as writing:
        (writing / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        safetensors.torch.save_file(_weights_to_save(slots), writing / WEIGHTS_FILE)


def from_pretrained(model: nn.Module, folder: str | Path, *, example: Any) -> SlotSet:
    """Make a fresh host the grown model that was saved; it can run, be baked, or grow on.

    Args:
        model: The host as it was before it grew, with any weights: they are overwritten.
        folder: Written by `save_pretrained`; verified before anything is read from it.
        example: One batch as the model takes it, as in `esper.attach`.

    Returns:
        The slots, with the committed seeds in them, which an optimizer that was made before lacks.

    Raises:
        FileNotFoundError: There is no such folder.
        RunFolderError: It is the folder of a run, whose network is in a folder inside of it.
        DamagedFolderError: A byte in it has changed since it was written.
        ValueError: The format is one this version cannot read, or the host is another one: a path,
            a width, a weight's name, shape or dtype differs. The model is as it was.
        BlueprintError: A blueprint is not registered here; import or install its package.
    """
    folder = Path(folder)
    _refuse_run_folder(folder)
    check_sealed(folder)
    config = _read_config(folder / CONFIG_FILE)
    slots = attach(
        model,
        list(config.slots),
        example=example,
        config={path: saved.config for path, saved in config.slots.items()},
        family={path: saved.family for path, saved in config.slots.items()},
    )
    try:
        slots.restore({path: _state_of(slots[path], config.slots[path]) for path in slots})
        _check_weights(model, folder / WEIGHTS_FILE)
        # Not strict: a tied weight has one name in the file.
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE), strict=False)
    except BaseException:
        remove_slots(model)
        raise
    return slots


def _refuse_run_folder(folder: Path) -> None:
    if (folder / DATABASE_FILE).exists():
        grown = folder / GROWN_FOLDER
        where = f"its network is in {grown}"
        if not grown.exists():
            where = f"its network will be in {grown} when it has finished"
        raise RunFolderError(f"{folder} is the folder of a run; {where}")


def _weights_to_save(slots: SlotSet) -> dict[str, Tensor]:
    """Return the state dict without living seeds; of tied weights, the first name only."""
    living = {
        id(tensor)  # not by name, as a hook on the host's state dict may rename
        for slot in slots.values()
        if slot.living is not None
        for tensor in (*slot.living.parameters(), *slot.living.buffers())
    }
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    storages: set[int] = set()
    for name, tensor in slots.model.state_dict(keep_vars=True).items():
        if name == KEY:  # of a callback; what is committed is in the config
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name!r} in the state dict is a {type(tensor).__name__}; only tensors are saved"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{name!r} in the state dict has the layout {tensor.layout}; only dense tensors "
                "are saved: register it with persistent=False, and make it in the host's __init__"
            )
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if id(tensor) in living or memory in seen:
            continue
        if not _can_be_kept(tensor.dtype):
            raise TypeError(
                f"{name!r} in the state dict is of {tensor.dtype}, which no safetensors file can "
                "hold; let the host keep it in another dtype"
            )
        seen.add(memory)
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        values = tensor.detach()
        weights[name] = (values if alone else values.clone()).contiguous()
    return weights


@functools.cache
def _can_be_kept(dtype: torch.dtype) -> bool:
    """Return whether safetensors writes and reads tensors of a dtype."""
    try:
        safetensors.torch.load(safetensors.torch.save({"": torch.empty(0, dtype=dtype)}))
    except KeyError:
        return False
    return True


def _read_config(file: Path) -> PretrainedConfig:
    raw = json.loads(file.read_text(encoding="utf-8"))
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version!r}; this esper reads version {FORMAT_VERSION}"
        )
    try:
        return PretrainedConfig.model_validate(raw)
    except ValidationError as error:
        raise DamagedFolderError(f"{file} is no config of a grown model: {error}") from error


def _state_of(slot: SeedSlot, saved: SavedSlot) -> dict[str, Any]:
    """Return the state of a slot in which nothing lives, and what is saved was committed."""
    committed = saved.committed
    fresh = slot.growth_state()
    life = LifeSnapshot.from_dump(fresh["slot"]["life"]).model_copy(
        update={
            "number": max(0, len(committed) - 1),
            "stage": SeedStage.FOSSILIZED if committed else SeedStage.DORMANT,
            "blueprint": committed[-1].blueprint if committed else None,
        }
    )
    snapshot = SlotSnapshot(
        family=saved.family,
        dim=saved.dim,
        config=saved.config,
        committed=committed,
        living=None,
        life=life,
    )
    return {**fresh, "slot": snapshot.model_dump(mode="json")}


def _check_weights(model: nn.Module, file: Path) -> None:
    """Raise unless a file holds just the weights that the model has."""
    state = model.state_dict()
    with safetensors.safe_open(str(file), framework="pt") as stored:
        names = set(stored.keys())
        loaded = {state[name].data_ptr() for name in names & state.keys()}
        missing = [
            name
            for name, tensor in state.items()
            if name not in names and tensor.data_ptr() not in loaded  # not tied to a stored one
        ]
        unexpected = sorted(names - state.keys())
        if missing or unexpected:
            raise ValueError(
                f"{file} is of another host than this {type(model).__name__}: it lacks "
                f"{', '.join(missing[:5]) or 'nothing'} and has "
                f"{', '.join(unexpected[:5]) or 'nothing'} beyond; build the host as it was"
            )
        at: dict[tuple[int, torch.Size], str] = {}
        for name in sorted(names):
            tensor = stored.get_tensor(name)
            other = at.setdefault((state[name].data_ptr(), state[name].shape), name)
            if other != name and not torch.equal(stored.get_tensor(other), tensor):
                raise ValueError(
                    f"{other!r} and {name!r} are one tensor in this {type(model).__name__}, and "
                    f"two in {file}; build the host as it was"
                )
            if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
                raise ValueError(
                    f"{name!r} in {file} is {tuple(tensor.shape)} {tensor.dtype}, in this "
                    f"{type(model).__name__} {tuple(state[name].shape)} {state[name].dtype}; build "
                    "the host as it was"
                )
