"""A folder of mirrors, one for each run that is told of."""

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from esper.bus.envelope import MessageRefusedError, Refusal
from esper.bus.messages import RunMessage
from esper.bus.mirror import Mirror, NoMirrorError, Taken, Told
from esper.bus.producers import producers_of
from esper.telemetry.run_folder import RunFolderError, is_written
from esper.telemetry.run_reader import RunReader
from esper.telemetry.run_store import name_in_id

_MAX_NAME_BYTES = 255

_LOG = logging.getLogger(__name__)


class Mirrors:
    """Opens mirrors as they are needed, and closes those that were not needed for longest.

    A run that is trained into the same folder needs no mirror beside it: what it tells is passed
    over as long as its own folder is there, and so is one whose mirror would have the name of
    something else. A run's own folder is where its producers are noted, or one of its id that is
    being written: a copy is none, and neither is one of which a copy goes on elsewhere. For one
    thread.

    Args:
        folder: That mirrors are in; is made if there is something to store.
        max_open: Mirrors; each holds some files open.
    """

    def __init__(self, folder: Path, *, max_open: int = 64) -> None:
        self._folder = folder
        self._max_open = max_open
        self._open: OrderedDict[str, Mirror | _PassedOver] = OrderedDict()
        """Those used last at the end."""

    def __len__(self) -> int:
        return sum(isinstance(one, Mirror) for one in self._open.values())

    def take(self, run: str, told: Sequence[Told]) -> Taken | None:
        """Store what is new of a run's messages; None if they are passed over.

        Args:
            run: An id that `check_name` has let pass.
            told: Of that run.

        Raises:
            RunFolderError: Another process writes the mirror.
            OSError: Nothing was stored.
            sqlite3.Error: Nothing was stored.
        """
        mirror = self._found(run, told)
        if not isinstance(mirror, Mirror):
            return None
        try:
            return mirror.take(told)
        except BaseException:
            self._drop(run)  # it is opened anew, and perhaps works then
            raise

    def close(self) -> None:
        """Let go of all files."""
        with ExitStack() as all_of_them:  # also where one is damaged
            for run in self._open:
                all_of_them.callback(self._drop, run)

    def _found(self, run: str, told: Sequence[Told]) -> "Mirror | _PassedOver":
        found = self._open.get(run)
        from_elsewhere = isinstance(found, _PassedOver) and not found.concerns(told)
        if found is not None and (from_elsewhere or not found.is_in_place):
            self._drop(run)  # or somebody has removed the folder
        if run not in self._open:
            while len(self._open) >= self._max_open:
                self._drop(next(iter(self._open)))
            self._open[run] = self._opened(run, told)
        self._open.move_to_end(run)
        return self._open[run]

    def _opened(self, run: str, told: Sequence[Told]) -> "Mirror | _PassedOver":
        first = next((one.message for one in told if isinstance(one.message, RunMessage)), None)
        folder = self._folder / run
        if not folder.exists() and (own := self._own(run, told)) is not None:
            _LOG.info("run %s is trained here, in %s, and has no mirror", run, own.folder)
            return own
        try:
            return Mirror(folder, first)
        except NoMirrorError as error:
            passed_over = _PassedOver(folder, _inode(folder))
            _LOG.warning("what run %s tells is not stored: %s", run, error)
            return passed_over

    def _own(self, run: str, told: Sequence[Told]) -> "_PassedOver | None":
        """Return the folder here that a run is trained into which tells this; None of another."""
        producers = frozenset(one.envelope.producer for one in told)
        name = run.rpartition("-")[0]
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            if name_in_id(folder.name) != name or folder.is_symlink():
                continue
            try:
                noted = producers_of(folder)
                if (producers and producers <= noted) or _is_written_by(run, folder):
                    return _PassedOver(folder, _inode(folder), noted | producers)
            except (RunFolderError, OSError):
                continue
        return None

    def _drop(self, run: str) -> None:
        found = self._open.pop(run)
        if isinstance(found, Mirror):
            found.close()


@dataclass(frozen=True)
class _PassedOver:
    """A folder that is no mirror, or a link, or the run's own, as it was found.

    Attributes:
        producers: By whom the run tells whose own it is; None if it is nobody's.
    """

    folder: Path
    inode: tuple[int, int]
    producers: frozenset[str] | None = None

    def concerns(self, told: Sequence[Told]) -> bool:
        """Whether messages are passed over because of it."""
        if self.producers is None:
            return True
        return all(one.envelope.producer in self.producers for one in told)

    @property
    def is_in_place(self) -> bool:
        """Whether it is still the one that was looked at."""
        try:
            return _inode(self.folder) == self.inode
        except OSError:
            return False


def _is_written_by(run: str, folder: Path) -> bool:
    """Return whether a run is being trained into a folder.

    Raises:
        RunFolderError: It cannot be read.
        OSError: As above.
    """
    if not is_written(folder):
        return False
    reader = RunReader(folder)
    return reader.run_id == run and not reader.is_mirror


def _inode(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


@lru_cache(maxsize=1_000)
def check_name(run: str) -> None:
    """Raise unless a run's id can be the name of a folder that people see, and of nothing else.

    Raises:
        MessageRefusedError: It leads elsewhere, is hidden, or has characters that no name has.
    """
    if (
        not run
        or not run.isprintable()
        or run.startswith(".")
        or any(sign in run for sign in "/\\")
        or len(os.fsencode(run)) > _MAX_NAME_BYTES
    ):
        raise MessageRefusedError(
            Refusal.WRONG_RUN, f"no folder can have the name of run {run[:80]!r}"
        )
