"""Bytes to predict: the sources of Python's standard library, and windows of any bytes.

Legend: B batch, T tokens (bytes).
"""

import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from esper.tasks.task import TaskDataError

CONTEXT_BYTES = 128
DECISION_WINDOWS = 128
"""Held-out windows that one decision is made by: 4,096 would cost as much as an epoch."""
FINAL_WINDOWS = 4096
"""Held-out windows that finished runs are compared by. Over 256 windows the difference between two
runs has a standard error of about 0.01 bits per byte, as much as what is to be told apart."""
_HELD_OUT_BATCH = 64

_LEFT_OUT = frozenset(
    {
        # not the standard library's
        "site-packages",
        "dist-packages",
        # absent or a package of its own in some distributions: the corpus would depend on them
        *("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"),
        # tables rather than code
        *("encodings", "pydoc_data"),
    }
)
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize")
"""Beginnings of files that an installation writes for itself."""


@dataclass(frozen=True)
class Splits:
    """Training, validation and test bytes, one dimension each, uint8."""

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def load_splits() -> Splits:
    """Return the corpus: about 7.8 MB in all, the same for the same version of Python.

    Each file goes as a whole into one split, by a checksum of its path, about 80, 10 and 10 of 100.

    Raises:
        TaskDataError: This Python has no sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in corpus_files(root):
        parts[split_of(path.relative_to(root).as_posix())].append(path.read_bytes())
    if not all(parts.values()):
        raise TaskDataError(
            f"the text task reads the sources of Python's standard library, and {root} has too few "
            "of them; a Python from python.org, a Linux distribution or conda has them, or use "
            "--task folder:PATH with text of your own"
        )
    return Splits(**{name: as_bytes_tensor(b"".join(files)) for name, files in parts.items()})


def corpus_files(root: Path) -> list[Path]:
    """Return the `*.py` files of the corpus below `root`, by relative path."""
    files = [
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith(_MACHINE_FILES)
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def split_of(relative_path: str) -> str:
    """Return "train", "validation" or "test", from the path alone."""
    share = zlib.crc32(relative_path.encode()) % 100
    if share < 80:
        return "train"
    return "validation" if share < 90 else "test"


def as_bytes_tensor(data: bytes) -> Tensor:
    """Return bytes as a tensor of uint8 with memory of its own."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class WindowBatches:
    """Training batches of random windows; an epoch is a fixed number of them.

    Decisions about growth fall once per epoch, and a pass over megabytes would be too long for one.

    Args:
        data: One dimension, uint8, at least one window long.
        random_seed: Fixes the windows of all epochs.
        context: Bytes of a window, T.
        batch_windows: B.
        epoch_batches: How many batches an epoch is.

    Raises:
        ValueError: `data` is shorter than one window.
    """

    def __init__(
        self,
        data: Tensor,
        *,
        random_seed: int,
        context: int,
        batch_windows: int,
        epoch_batches: int,
    ) -> None:
        if len(data) <= context:
            raise ValueError(
                f"training text must have at least {context + 1} bytes, one window; got {len(data)}"
            )
        self._data = data
        self._context = context
        self._batch_windows = batch_windows
        self._epoch_batches = epoch_batches
        self.generator = torch.Generator().manual_seed(random_seed)
        """Draws every epoch; a checkpoint keeps where it stands."""

    def __len__(self) -> int:
        return self._epoch_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self._epoch_batches):
            last = len(self._data) - self._context
            starts = torch.randint(0, last, (self._batch_windows,), generator=self.generator)
            yield windows(self._data, starts, self._context)


def windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return bytes and the byte after each of them, both `B T` of dtype int64.

    Args:
        data: One dimension, uint8.
        starts: Index of each window's first byte, shape `B`.
        context: T.
    """
    taken = data[starts[:, None] + torch.arange(context + 1)].long()
    return taken[:, :-1], taken[:, 1:]


def held_out_windows(data: Tensor, most: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of windows that do not overlap, spread evenly over `data`, always the same.

    Args:
        data: One dimension, uint8.
        most: Of them, if so many fit.
        context: Bytes of a window, T.

    Raises:
        ValueError: `data` is shorter than one window.
    """
    reach = context + 1
    fitting = len(data) // reach
    if fitting == 0:
        raise ValueError(
            f"held-out text must have at least {reach} bytes, one window; got {len(data)}"
        )
    count = min(most, fitting)
    starts = reach * (torch.arange(count) * fitting // count)
    return [windows(data, part, context) for part in starts.split(_HELD_OUT_BATCH)]
