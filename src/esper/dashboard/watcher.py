"""All runs in a folder as they stand, and the stories of those that somebody looks at."""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from esper.dashboard.run_folders import Refusal, RunFolders
from esper.dashboard.run_tail import RunTail
from esper.dashboard.watched_run import RunRow, WatchedRun

MAX_KEPT_ROWS = 300_000
"""Events and values of the stories that are kept in mind; the one looked at last always is, and
those that an open page holds."""
_LOOKS_BETWEEN_SEARCHES = 5

_LOG = logging.getLogger(__name__)


class UnknownRunError(LookupError):
    """No run has this id."""


@dataclass(frozen=True, kw_only=True)
class RowChanges:
    """What has changed in the list.

    Attributes:
        version: Ask with it for what changes later.
        rows: New ones, and those that read otherwise now.
        gone: Ids of runs whose folder is no longer there.
        refused: Folders that are not shown.
    """

    version: int
    rows: list[RunRow]
    gone: list[str]
    refused: list[Refusal]


class Watcher:
    """Keeps the list of runs, and the stories of a few.

    May be used by several threads.

    Args:
        root: Where runs are, or will be.
    """

    def __init__(self, root: Path) -> None:
        self._folders = RunFolders(root)
        self._lock = threading.Lock()
        self._runs: dict[str, WatchedRun] = {}
        self._changed_in: dict[str, int] = {}
        self._gone_in: dict[str, int] = {}
        self._refused: tuple[Refusal, ...] = ()
        self._version = 0
        self._looks = 0
        self._tails: OrderedDict[str, RunTail] = OrderedDict()
        self._held: WeakValueDictionary[str, RunTail] = WeakValueDictionary()
        """All that somebody has, also those that are kept no longer: read once is enough."""
        self._tails_lock = threading.Lock()

    @property
    def root(self) -> Path:
        """Where runs are looked for."""
        return self._folders.root

    def look(self) -> bool:
        """Look for new rows, and now and then for new runs; return whether anything changed."""
        with self._lock:
            before = self._version
            if self._looks % _LOOKS_BETWEEN_SEARCHES == 0:
                self._search()
            self._looks += 1
            for run_id, run in self._runs.items():
                if run.look():
                    self._note(run_id)
            return self._version != before

    def _search(self) -> None:
        try:
            found = self._folders.find()
        except OSError as error:
            _LOG.warning("%s cannot be searched for runs: %s", self.root, error)
            return
        for run_id in [run_id for run_id in self._runs if run_id not in found.folders]:
            del self._runs[run_id]
            del self._changed_in[run_id]
            self._version += 1
            self._gone_in[run_id] = self._version
            with self._tails_lock:
                self._tails.pop(run_id, None)
                self._held.pop(run_id, None)
        for run_id, folder in found.folders.items():
            if run_id not in self._runs:
                self._gone_in.pop(run_id, None)
                self._runs[run_id] = WatchedRun(run_id, folder)
                self._note(run_id)
        if found.refused != self._refused:
            self._refused = found.refused
            self._version += 1

    def _note(self, run_id: str) -> None:
        self._version += 1
        self._changed_in[run_id] = self._version

    def changes(self, *, since: int = 0) -> RowChanges:
        """Return what changed after a version; 0 returns every row."""
        with self._lock:
            return RowChanges(
                version=self._version,
                rows=[
                    self._runs[run_id].row
                    for run_id, version in self._changed_in.items()
                    if version > since
                ],
                gone=[run_id for run_id, version in self._gone_in.items() if version > since],
                refused=list(self._refused),
            )

    def version_of(self, run_id: str) -> int:
        """Return the version in which a run's row changed last; 0 if there is no such run."""
        with self._lock:
            return self._changed_in.get(run_id, 0)

    def folder(self, run_id: str) -> Path:
        """Return a run's folder, of those that are there now.

        Raises:
            UnknownRunError: There is no such run.
        """
        with self._lock:
            known = self._runs.get(run_id)
        if known is not None and self._folders.still_hold(known.folder):
            return known.folder
        found = self._folders.find().folders.get(run_id)
        if found is None:
            raise UnknownRunError(run_id)
        return found

    def reason_against(self, run_id: str) -> str | None:
        """Return why a folder is not shown, if it was found and is not."""
        with self._lock:
            return next((each.reason for each in self._refused if each.id == run_id), None)

    def tail(self, run_id: str) -> RunTail:
        """Return the story of a run, which may have to be read yet; hold it to have it kept.

        Raises:
            UnknownRunError: There is no such run.
            RunFolderError: It cannot be read.
        """
        folder = self.folder(run_id)
        with self._tails_lock:
            tail = self._held.get(run_id)
            if tail is None:
                tail = self._held[run_id] = RunTail(folder)
            self._tails[run_id] = tail
            self._tails.move_to_end(run_id)
            kept = sum(each.num_rows for each in self._tails.values())
            while kept > MAX_KEPT_ROWS and len(self._tails) > 1:
                kept -= self._tails.popitem(last=False)[1].num_rows
            return tail
