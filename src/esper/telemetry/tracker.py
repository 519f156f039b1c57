"""What sinks that write for another tool have in common."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from esper.lifecycle.events import EventRecord
from esper.telemetry.run_folder import RunStatus, status_after, write_whole

Setting = bool | int | float | str

_RUN_ID_FILE = "esper_run_id.txt"


class TrackerError(ValueError):
    """A tracker cannot be opened; the message says which, why, and what to do."""


class Tracker(ABC):
    """A sink for a tool that follows runs. It is opened when it is made, and closed once.

    In a `with` it is closed with the status that the block ends with.
    """

    @property
    @abstractmethod
    def place(self) -> str:
        """Where its tool finds the run: a command or an address."""

    @abstractmethod
    def publish(self, record: EventRecord) -> None:
        """Take one event."""

    @abstractmethod
    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Take named values measured after an epoch."""

    @abstractmethod
    def flush(self) -> None:
        """Make what was taken durable; called after every epoch."""

    @abstractmethod
    def close(self, status: RunStatus = "finished") -> None:
        """Make everything durable, say how the run ended, and let go of files and connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(status_after(error))


def flat_settings(config: Mapping[str, Any]) -> dict[str, Setting]:
    """Return a nested config with dotted names, for tools that know plain values only.

    Args:
        config: JSON values; None reads as "none", a list as JSON.
    """
    return dict(_flat(config, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Setting]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is None:
        yield name, "none"
    else:
        yield name, value if isinstance(value, Setting) else json.dumps(value)


def read_run_id(folder: Path) -> str | None:
    """Return under which id a tool knows the run that was tracked from this folder, if one was.

    A machine that went down may have left none in its file: what is tracked from then on is another
    run to the tool.
    """
    file = folder / _RUN_ID_FILE
    return (file.read_text(encoding="utf-8").strip() or None) if file.is_file() else None


def write_run_id(folder: Path, run_id: str) -> None:
    """Note under which id a tool knows the run, for when it is resumed."""
    write_whole(folder / _RUN_ID_FILE, f"{run_id}\n")
