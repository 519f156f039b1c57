"""Checkpoints of a run: whole or not at all, and verified before anything is taken from them."""

import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from esper.lifecycle.events import (
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    RunResumed,
)
from esper.lifecycle.record import Record
from esper.slots.nested import map_tensors
from esper.slots.replication import Replication
from esper.slots.sharded import whole
from esper.training.sealed_folder import (
    MANIFEST_FILE,
    DamagedFolderError,
    check_sealed,
    foreign_names,
    remove_damaged,
    remove_sealed,
    sealed_folder,
)
from esper.training.state_tree import (
    read_tree,
    tree_as_tensor,
    tree_files,
    tree_from_tensor,
    write_tree,
)
from esper.training.trainer import Trainer

INFO_FILE = "checkpoint.json"
LATEST = "latest"
"""A link to the newest checkpoint, for people, where there can be links; a run goes on from the
newest that is whole."""
FORMAT_VERSION = 9

_STATE = "state"
_FILES = (INFO_FILE, *tree_files(_STATE))
_NAME = re.compile(r"step-\d{10}")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}-\w+")


class CheckpointError(ValueError):
    """There is no checkpoint that a run could go on from; the message says why."""


class CheckpointInfo(Record):
    """What a checkpoint is of; kept as checkpoint.json in it."""

    format_version: int
    torch_version: str
    step: int
    epoch: int
    """Epochs that were finished."""
    loss: float | None
    """Held-out, as last evaluated; None before the first evaluation."""


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """A checkpoint that was read and verified.

    Attributes:
        damaged: Newer ones that are not what was written.
    """

    name: str
    info: CheckpointInfo
    state: Mapping[str, Any]
    damaged: tuple[CheckpointDamaged, ...]

    @property
    def events(self) -> tuple[CheckpointDamaged | RunResumed, ...]:
        """What there is to tell once a run goes on from here."""
        return (*self.damaged, RunResumed(name=self.name))

    def give_to(self, trainer: Trainer) -> None:
        """Let a trainer go on from here, without telling so.

        Raises:
            ValueError: As `Trainer.load_state_dict`.
            BlueprintError: As `Trainer.load_state_dict`.
        """
        places, replication = self.state["data"], trainer.growth.slots.replication
        rank = 0 if replication is None else replication.rank
        place = places[rank if replication is not None and len(places) == replication.size else 0]
        trainer.load_state_dict({**self.state, "data": place})


class Checkpoints:
    """Keeps a trainer's whole state in a folder, one sub-folder each time.

    Safetensors and JSON only, each file with its SHA-256. A checkpoint appears by a rename, when it
    is on the disk as a whole. Those of later steps then go: they are damaged, or of a way that the
    run has gone back on. What people put beside or into them stays, and is none of them.

    Args:
        folder: Is created.
        interval_steps: Optimizer steps between two; None makes one after each epoch.
        min_seconds: Of an epoch's end, pass it by unless so long has gone since the last one.
        keep_last: How many of the newest stay; older ones are removed.
        keep_best: Keep the one with the lowest held-out loss besides.
        clock: Monotonic seconds.

    Raises:
        CheckpointError: The folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        interval_steps: int | None = None,
        min_seconds: float = 0.0,
        keep_last: int = 2,
        keep_best: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if interval_steps is not None and interval_steps < 1:
            raise ValueError(f"interval_steps must be at least 1, got {interval_steps}")
        self.folder = Path(folder)
        self.interval_steps = interval_steps
        self.min_seconds = min_seconds
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._clock = clock
        self._last_seconds = clock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {self.folder}: {error}; choose another folder, "
                "or train without checkpoints"
            ) from error
        self._of_this_run: set[str] = set()
        """Those that it has written, or found where it went on; others' of later steps are left."""
        self._cleared = False
        """Whether what a killed process began is cleared away; the one that writes does it."""

    def after_step(self, trainer: Trainer) -> None:
        """Save if it is time, between two steps."""
        if self.interval_steps is not None and trainer.growth.step % self.interval_steps == 0:
            self.save(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """Save if it is time, between two epochs."""
        if self.interval_steps is not None:
            return
        due = self._clock() - self._last_seconds >= self.min_seconds
        replication = trainer.growth.slots.replication
        if replication is not None:  # all of them save, or none
            due = replication.from_first(due)
        if due:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path | None:
        """Write a checkpoint, then remove those that need not be kept.

        Of several processes all must call it, and the first one writes.

        Returns:
            Its folder; None if the disk refused it, or holds something else in its place, which an
            event tells, and training goes on.

        Raises:
            TypeError: The state holds what no checkpoint can; it says what and where.

        Effects: the time that it takes is no step's, and no cost of the run. As
        `Trainer.prune_failed`.
        """
        with trainer.growth.held_up():
            return self._save(trainer)

    def _save(self, trainer: Trainer) -> Path | None:
        growth, slots = trainer.growth, trainer.growth.slots
        target = self.folder / f"step-{growth.step:010d}"
        started = self._clock()
        growth.sink_guard.flush()  # what sinks hold of these steps must not go with the process
        trainer.prune_failed()  # in every process; only the first may take the state
        places = _places_in_data(trainer)
        first = slots.replication is None or slots.replication.rank == 0
        state = trainer.state_dict() if first or slots.sharded else {}
        if slots.sharded:
            state = map_tensors(whole, state)
        if not first:
            return None
        state["data"] = places
        losses = [loss for loss in growth.losses[-1:] if math.isfinite(loss)]
        info = CheckpointInfo(
            format_version=FORMAT_VERSION,
            torch_version=torch.__version__,
            step=growth.step,
            epoch=trainer.epoch,
            loss=losses[0] if losses else None,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            self._clear_unfinished()
            remove_damaged(target, _FILES)
            with sealed_folder(target, overwrite=True) as writing:
                (writing / INFO_FILE).write_text(
                    info.model_dump_json(indent=2) + "\n", encoding="utf-8"
                )
                write_tree(state, writing, _STATE)
        except (OSError, DamagedFolderError) as error:
            growth.publish([CheckpointFailed(name=target.name, error=str(error))])
            return None
        with suppress(OSError):  # not every file system has links
            self._point_at(target)
        not_removed = self._remove_old(target.name)
        self._last_seconds = self._clock()
        seconds = self._last_seconds - started
        growth.publish([CheckpointSaved(name=target.name, seconds=seconds), *not_removed])
        return target

    def newest(self) -> "FoundCheckpoint":
        """Return the newest checkpoint that is whole.

        Raises:
            CheckpointError: There is none, or it is of another version.
        """
        damaged = []
        for name in reversed(self.names()):
            try:
                info, state = read_checkpoint(self.folder / name)
            except DamagedFolderError as error:
                damaged.append(CheckpointDamaged(name=name, error=str(error)))
                continue
            return FoundCheckpoint(name=name, info=info, state=state, damaged=tuple(damaged))
        why = "; ".join(event.error for event in damaged) or "it is empty"
        raise CheckpointError(f"{self.folder} has no checkpoint to go on from: {why}")

    def resume(self, trainer: Trainer) -> CheckpointInfo:
        """Let a trainer go on from the newest checkpoint that is whole.

        Raises:
            CheckpointError: There is none, or it is of another version.
            ValueError: The trainer is not made as it was then; the message says what differs.
            BlueprintError: A blueprint is not registered here.
        """
        replication = trainer.growth.slots.replication
        found = self.newest() if replication is None else self._newest_for_all(replication)
        found.give_to(trainer)
        trainer.growth.publish(found.events)
        self._of_this_run.update(self.names())
        if replication is not None:  # nobody goes on, and saves, while others still read
            replication.check_equal("the step to go on from", found.info.step)
        return found.info

    def _newest_for_all(self, replication: Replication) -> FoundCheckpoint:
        """Return, in every process, the checkpoint that the first one finds."""
        found, why = None, ""
        if replication.rank == 0:
            try:
                found = self.newest()
            except CheckpointError as error:
                why = str(error)
        name, why = replication.from_first([found.name if found else None, why])
        if name is None:
            raise CheckpointError(why)
        if found is None:
            info, state = read_checkpoint(self.folder / name)
            found = FoundCheckpoint(name=name, info=info, state=state, damaged=())
        return found

    def names(self) -> list[str]:
        """Return the checkpoints that are there, whole or not, oldest first.

        A folder without a manifest that holds files of others is none.
        """
        every = (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return sorted(path.name for path in every if _was_sealed(path))

    def _clear_unfinished(self) -> None:
        if not self._cleared:
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            self._cleared = True

    def _point_at(self, target: Path) -> None:
        link = self.folder / LATEST
        fresh = self.folder / f".{LATEST}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.name)
        fresh.replace(link)

    def _remove_old(self, newest: str) -> list[CheckpointFailed]:
        """Remove those that need not be kept; return what tells of those that cannot be."""
        self._of_this_run.add(newest)
        try:
            names = self.names()
        except OSError as error:
            return [CheckpointFailed(name=newest, error=f"older ones cannot be removed: {error}")]
        passed = [name for name in names if name <= newest]
        kept = set(passed[-self.keep_last :])
        if self.keep_best:
            losses = {name: loss for name in passed if (loss := self._loss(name)) is not None}
            kept |= {min(losses, key=lambda name: losses[name])} if losses else set()
        # Of this run, what lies above is damaged, or of steps that it has gone back behind.
        old = [n for n in names if n not in kept and (n <= newest or n in self._of_this_run)]
        failed = []
        for name in old:
            try:
                remove_sealed(self.folder / name, _FILES)
            except OSError as error:
                failed.append(CheckpointFailed(name=name, error=f"it cannot be removed: {error}"))
        return failed

    def _loss(self, name: str) -> float | None:
        try:
            return _read_info(self.folder / name).loss
        except (CheckpointError, DamagedFolderError):
            return None


def _was_sealed(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or what is left of one."""
    if not folder.is_dir():
        return False
    return (folder / MANIFEST_FILE).exists() or not foreign_names(folder, _FILES)


def _places_in_data(trainer: Trainer) -> list[Any]:
    """Return where in its data and its random streams each process is, by rank."""
    mine, replication = trainer.data.state_dict(), trainer.growth.slots.replication
    if replication is None:
        return [mine]
    return [tree_from_tensor(data) for data in replication.gather(tree_as_tensor(mine, "data"))]


def read_checkpoint(folder: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Return what a checkpoint is of, and the trainer's state; every byte is verified first.

    Raises:
        DamagedFolderError: A file was changed or removed.
        CheckpointError: It is of a version that this esper cannot read.
    """
    check_sealed(folder)
    info = _read_info(folder)
    try:
        state: dict[str, Any] = read_tree(folder, _STATE)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DamagedFolderError(f"{folder / _STATE}.* is no state of a run: {error}") from error
    return info, state


def _read_info(folder: Path) -> CheckpointInfo:
    file = folder / INFO_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFolderError(f"{file} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}; this esper reads version {FORMAT_VERSION}"
        )
    try:
        return CheckpointInfo.from_dump(raw)
    except ValueError as error:
        raise DamagedFolderError(f"{file} is damaged: {error}") from error
