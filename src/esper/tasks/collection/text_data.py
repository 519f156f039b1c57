"""Text of a data set as bytes."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from esper.tasks.collection.address import Address
from esper.tasks.collection.columns import TextColumn
from esper.tasks.collection.parts import HELD_OUT_FRACTION, SPLITS, Part, make_parts
from esper.tasks.collection.source import open_source
from esper.tasks.task import TaskDataError
from esper.tasks.text.data import CONTEXT_BYTES, Splits, as_bytes_tensor

MAX_BYTES = 1 << 28
"""Of a part; what is longer is cut, and a note says so."""

_MIN_ROWS = 10
"""With fewer rows, as with a folder of one long file, the text is cut within a row."""

_CHUNK_ROWS = 1000


@lru_cache(maxsize=2)
def load_text(address: Address, column: TextColumn) -> tuple[Splits, tuple[str, ...]]:
    """Return the three splits and notes on what was left out. Rows are joined by line breaks.

    Raises:
        TaskDataError: A split is shorter than one window.
    """
    splits = open_source(address).splits
    missing = [split for split in SPLITS if split not in splits]
    if missing and len(splits["train"]) < _MIN_ROWS:
        data, notes = _cut_within_rows(splits, missing, address, column)
    else:
        parts, notes = make_parts(splits, mixed=False)
        if address.samples is not None and address.samples < len(parts["train"].indices):
            total = len(parts["train"].indices)
            parts["train"] = parts["train"].first(address.samples)
            notes.append(f"train: the first {address.samples:,} of {total:,} rows, by samples=")
        data = {}
        for split in SPLITS:
            data[split], cut = _read(parts[split], column.text)
            notes += [f"{split}: {cut}"] if cut else []
    for split, text in data.items():
        if len(text) <= CONTEXT_BYTES:
            raise TaskDataError(
                f"the {split} text has {len(text)} bytes, and one window takes "
                f"{CONTEXT_BYTES + 1}; more text is needed"
            )
    tensors = {split: as_bytes_tensor(text) for split, text in data.items()}
    return Splits(**tensors), tuple(notes)


def _read(part: Part, column: str) -> tuple[bytes, str]:
    """Return a part's text, and what was cut off in words, if anything was."""
    rows = part.rows.select_columns([column])
    pieces: list[bytes] = []
    size = 0
    for start in range(0, len(part.indices), _CHUNK_ROWS):
        for value in rows[part.indices[start : start + _CHUNK_ROWS]][column]:
            if value is not None:
                pieces.append(value if isinstance(value, bytes) else value.encode())
                size += len(pieces[-1]) + 1
        if size > MAX_BYTES:
            total = len(part.indices)
            read = f"the first {min(total, start + _CHUNK_ROWS):,} of {total:,} rows"
            return b"\n".join(pieces)[
                :MAX_BYTES
            ], f"{read}, {MAX_BYTES:,} bytes, are kept in memory"
    return b"\n".join(pieces), ""


def _cut_within_rows(
    splits: Mapping[str, Any], missing: Sequence[str], address: Address, column: TextColumn
) -> tuple[dict[str, bytes], list[str]]:
    """Take what is missing from the end of the text to train on, a tenth of its bytes each."""
    if address.samples is not None:
        raise TaskDataError(
            f"samples= chooses among rows, and this data set has {len(splits['train'])}"
        )
    data, notes = {}, []
    for split, rows in splits.items():
        data[split], cut = _read(Part(rows, range(len(rows))), column.text)
        notes += [f"{split}: {cut}"] if cut else []
    held_out = round(HELD_OUT_FRACTION * len(data["train"]))
    for split in reversed(missing):
        end = len(data["train"]) - held_out
        data["train"], data[split] = data["train"][:end], data["train"][end:]
    each = " each" if len(missing) > 1 else ""
    taken = (
        f"{' and '.join(missing)}: the last {held_out:,} bytes{each} of the text to train on, as "
        f"it has {len(splits['train'])} rows or files only"
    )
    return data, [taken, *notes]
