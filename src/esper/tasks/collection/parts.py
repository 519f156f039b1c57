"""Which rows are for training, validation and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from esper.tasks.task import TaskDataError

SPLITS = ("train", "validation", "test")
HELD_OUT_FRACTION = 0.1
_ORDER_SEED = 0


@dataclass(frozen=True)
class Part:
    """Rows of a `datasets.Dataset`, in the order in which they are taken."""

    rows: Any
    indices: Sequence[int]

    def first(self, count: int) -> "Part":
        """Return at most the first `count` rows."""
        return Part(self.rows, self.indices[:count])


def make_parts(splits: Mapping[str, Any], *, mixed: bool) -> tuple[dict[str, Part], list[str]]:
    """Return the three parts, and a note for each that the data set itself does not have.

    What is missing is a tenth of the rows to train on, always the same ones.

    Args:
        splits: "train", and "validation" and "test" where there are any.
        mixed: Take rows in a random order, always the same, for data that is sorted by class. Text
            keeps its order: neighbouring rows may belong together.

    Raises:
        TaskDataError: A split is empty, or there are too few rows to take some away.
    """
    for split, rows in splits.items():
        if len(rows) == 0:
            raise TaskDataError(f"split {split!r} of the data set is empty")
    parts = {split: Part(rows, _order(len(rows), mixed=mixed)) for split, rows in splits.items()}
    total = len(splits["train"])
    count = max(1, round(HELD_OUT_FRACTION * total))
    notes = []
    for split in SPLITS[1:]:
        if split in parts:
            continue
        train = parts["train"]
        if len(train.indices) <= count:
            raise TaskDataError(
                f"{total} rows are too few to train on and to take a {split} part from; 3 at least "
                "are needed, hundreds make sense"
            )
        parts[split] = Part(train.rows, train.indices[-count:])
        parts["train"] = Part(train.rows, train.indices[:-count])
        notes.append(f"{split}: {count:,} of {total:,} rows taken from train, as it has no split")
    return parts, notes


def _order(count: int, *, mixed: bool) -> list[int]:
    if not mixed:
        return list(range(count))
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
