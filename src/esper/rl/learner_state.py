"""What a policy's training goes on from, in a folder: whole or not at all, and no pickles."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from esper.lifecycle.record import Record
from esper.rl.distributed_ppo import DistributedPPO
from esper.training.sealed_folder import (
    DamagedFolderError,
    check_sealed,
    remove_damaged,
    sealed_folder,
)
from esper.training.state_tree import read_tree, tree_files, write_tree

INFO_FILE = "learner.json"
FORMAT_VERSION = 1

_STATE = "state"
_NAME = re.compile(r"rollout-\d{8}")


class LearnerStateError(ValueError):
    """There is no state that a training could go on from; the message says why."""


class LearnerInfo(Record):
    """What a state is of; kept as learner.json beside it."""

    format_version: int
    num_rollouts: int
    num_timesteps: int
    settings: dict[str, Any]
    """Of the training, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class FoundLearnerState:
    """A state that was read and verified.

    Attributes:
        damaged: Why newer ones were passed over.
    """

    info: LearnerInfo
    state: Mapping[str, Any]
    damaged: tuple[str, ...]


class LearnerStates:
    """Keeps the newest states of a learner, each in a folder of its own.

    Args:
        folder: Is created with the first one.
        keep_last: How many stay.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.folder = folder
        self._keep_last = keep_last

    def save(self, learner: DistributedPPO, settings: Mapping[str, Any]) -> Path:
        """Write a learner's state; return where.

        Raises:
            OSError: The folder cannot be written; what was there stays.
        """
        target = self.folder / f"rollout-{learner.num_rollouts:08d}"
        info = LearnerInfo(
            format_version=FORMAT_VERSION,
            num_rollouts=learner.num_rollouts,
            num_timesteps=learner.num_timesteps,
            settings=dict(settings),
        )
        remove_damaged(target, (INFO_FILE, *tree_files(_STATE)))
        with sealed_folder(target, overwrite=True) as writing:
            text = info.model_dump_json(indent=2) + "\n"
            (writing / INFO_FILE).write_text(text, encoding="utf-8")
            write_tree(learner.state_dict(), writing, _STATE)
        for name in self.names()[: -self._keep_last]:
            shutil.rmtree(self.folder / name)
        return target

    def newest(self) -> FoundLearnerState:
        """Return the newest state that is whole.

        Raises:
            LearnerStateError: There is none, or it is of another version.
        """
        damaged = []
        for name in reversed(self.names()):
            try:
                info, state = _read(self.folder / name)
            except DamagedFolderError as error:
                damaged.append(str(error))
                continue
            return FoundLearnerState(info=info, state=state, damaged=tuple(damaged))
        why = "; ".join(damaged) or "there is none"
        raise LearnerStateError(f"{self.folder} has no state of a learner to go on from: {why}")

    def names(self) -> list[str]:
        """Return the states that are there, whole or not, oldest first."""
        every = (path for path in self.folder.glob("*") if path.is_dir())
        return sorted(path.name for path in every if _NAME.fullmatch(path.name))


def _read(folder: Path) -> tuple[LearnerInfo, Mapping[str, Any]]:
    check_sealed(folder)
    try:
        raw = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFolderError(f"{folder / INFO_FILE} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise LearnerStateError(
            f"{folder} has format version {version!r}; this esper reads version {FORMAT_VERSION}"
        )
    try:
        return LearnerInfo.from_dump(raw), read_tree(folder, _STATE)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DamagedFolderError(f"{folder} holds no state of a learner: {error}") from error
