"""Images of a data set as tensors of bytes.

Legend: N images, B batch, C channels, H height, W width.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from esper.tasks.collection.address import Address
from esper.tasks.collection.columns import ImageColumns
from esper.tasks.collection.parts import Part, make_parts
from esper.tasks.collection.source import open_source
from esper.tasks.task import TaskDataError

BATCH_IMAGES = 64
EPOCH_BATCHES = 40
MAX_SIZE = 64
MIN_SIZE = 4
MIN_CLASSES = 2
MAX_TRAIN_BYTES = 1 << 30
MAX_VALIDATION_IMAGES = 1000
"""What gates judge by is evaluated after each epoch."""
MAX_TEST_IMAGES = 10_000

_LOOKED_AT = 256
_CHUNK_IMAGES = 256
_GREY_MODES = frozenset({"1", "L", "LA"})
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class Split:
    """Images `N C H W` of dtype uint8 with their labels `N`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Images:
    """A loaded data set.

    Attributes:
        classes: Their names, by label.
        notes: What was left out or taken from elsewhere.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.train.images.shape[2]


@dataclass(frozen=True)
class _Format:
    """What every image becomes."""

    size: int
    mode: str

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3


@lru_cache(maxsize=2)
def load_images(address: Address, columns: ImageColumns) -> Images:
    """Decode a data set into memory: square images, grey if all that were looked at are, else RGB.

    The side is that of the most common size, the longer one, or 64 pixels if that is larger.
    Images of another size or shape are resized to it.

    Raises:
        TaskDataError: An image or a label is missing or cannot be used, or there are too few rows.
    """
    splits = open_source(address).splits
    parts, notes = make_parts(splits, mixed=True)
    classes = _classes(splits["train"], columns.label)
    look = _common_format(parts["train"], columns, address)
    limits = {
        "train": _train_limit(look, address.samples),
        "validation": MAX_VALIDATION_IMAGES,
        "test": MAX_TEST_IMAGES,
    }
    loaded = {}
    for name, part in parts.items():
        if len(part.indices) > limits[name]:
            notes.append(
                f"{name}: {limits[name]:,} of {len(part.indices):,} images, drawn at random, "
                "always the same"
            )
        loaded[name] = _decode(name, part.first(limits[name]), columns, look, classes)
    return Images(**loaded, classes=tuple(map(str, classes)), notes=tuple(notes))


def _train_limit(look: _Format, samples: int | None) -> int:
    fitting = max(1, MAX_TRAIN_BYTES // (look.channels * look.size**2))
    return fitting if samples is None else min(samples, fitting)


def _classes(rows: Any, label: str) -> dict[Any, int]:
    """Return the label of each value in the column; a class label's names stand for themselves."""
    names = getattr(rows.features[label], "names", None)
    if names is not None:
        if len(rows.unique(label)) < MIN_CLASSES:
            raise TaskDataError(
                f"column {label!r} has the same class in all {len(rows):,} rows of split 'train', "
                f"and it takes {MIN_CLASSES} to classify; put the images of each class into a "
                "folder of its own, or choose the label with ,label=COLUMN"
            )
        return {name: index for index, name in enumerate(names)}
    values = sorted(value for value in rows.unique(label) if value is not None)
    if not MIN_CLASSES <= len(values) <= max(MIN_CLASSES, len(rows) // 2):
        raise TaskDataError(
            f"column {label!r} has {len(values):,} different values in {len(rows):,} rows, which "
            "is no classification; choose the label with ,label=COLUMN"
        )
    return {value: index for index, value in enumerate(values)}


def _common_format(part: Part, columns: ImageColumns, address: Address) -> _Format:
    images = _fetch("train", part.first(_LOOKED_AT), columns)[columns.image]
    (width, height), _ = Counter(image.size for image in images).most_common(1)[0]
    size = address.size or min(MAX_SIZE, max(width, height))
    if size < MIN_SIZE:
        raise TaskDataError(
            f"images of {size} pixels are too small; {MIN_SIZE} at least are needed, set size="
        )
    grey = all(image.mode in _GREY_MODES for image in images)
    return _Format(size, "L" if grey else "RGB")


def _decode(
    name: str, part: Part, columns: ImageColumns, look: _Format, classes: dict[Any, int]
) -> Split:
    images = torch.empty(
        (len(part.indices), look.channels, look.size, look.size), dtype=torch.uint8
    )
    labels = torch.empty(len(part.indices), dtype=torch.long)
    for start in range(0, len(part.indices), _CHUNK_IMAGES):
        chunk = Part(part.rows, part.indices[start : start + _CHUNK_IMAGES])
        fetched = _fetch(name, chunk, columns)
        for place, (image, value) in enumerate(
            zip(fetched[columns.image], fetched[columns.label], strict=True), start
        ):
            images[place] = _pixels(image, look)
            labels[place] = _label(name, value, columns.label, classes, part.rows)
    return Split(images, labels)


def _fetch(name: str, part: Part, columns: ImageColumns) -> dict[str, Any]:
    """Return the rows of a part, images decoded."""
    rows = part.rows.select_columns([columns.image, columns.label])
    try:
        fetched: dict[str, Any] = rows[part.indices]
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises on broken files
        raise TaskDataError(f"an image of split {name!r} cannot be decoded: {error}") from error
    for image in fetched[columns.image]:
        if image is None:
            raise TaskDataError(f"a row of split {name!r} has no image in {columns.image!r}")
        if image.mode.startswith(_DEEP_MODES):
            raise TaskDataError(
                f"an image of split {name!r} has pixels of more than 8 bits (mode {image.mode}); "
                "convert the data set to 8 bits first"
            )
    return fetched


def _pixels(image: Any, look: _Format) -> Tensor:
    """Return a PIL image as `C H W`."""
    fitted = image.convert(look.mode)
    if fitted.size != (look.size, look.size):
        fitted = fitted.resize((look.size, look.size))
    flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return flat.view(look.size, look.size, look.channels).permute(2, 0, 1)


def _label(name: str, value: Any, column: str, classes: dict[Any, int], rows: Any) -> int:
    named = hasattr(rows.features[column], "names")
    known = range(len(classes)) if named else classes
    if value not in known:
        raise TaskDataError(
            f"a row of split {name!r} has {value!r} in {column!r}, which is none of the "
            f"{len(classes)} classes to train on"
        )
    return int(value) if named else classes[value]


class ImageBatches:
    """Shuffled training batches in [0, 1]; an epoch is a fixed number of them.

    They follow one another through as many passes over the images as it takes; decisions about
    growth fall once per epoch, however large the data set is. Images are not augmented: what
    leaves a label alone is different for digits and for cats.

    Args:
        random_seed: Fixes the order of all epochs.
    """

    def __init__(self, split: Split, *, random_seed: int) -> None:
        self._split = split
        self._generator = torch.Generator().manual_seed(random_seed)
        self._waiting = torch.empty(0, dtype=torch.long)
        self._batch = min(BATCH_IMAGES, len(split.labels))

    def __len__(self) -> int:
        return EPOCH_BATCHES

    def state_dict(self) -> dict[str, Tensor]:
        """Return where its order stands."""
        return {"generator": self._generator.get_state(), "waiting": self._waiting.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self._generator.set_state(state["generator"])
        self._waiting = state["waiting"].clone()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(EPOCH_BATCHES):
            if len(self._waiting) < self._batch:
                self._waiting = torch.randperm(len(self._split.labels), generator=self._generator)
            indices, self._waiting = self._waiting.split(
                [self._batch, len(self._waiting) - self._batch]
            )
            yield as_floats(self._split.images[indices]), self._split.labels[indices]


class HeldOutImages(Sequence[tuple[Tensor, Tensor]]):
    """Batches of a split in [0, 1], converted as they are taken."""

    def __init__(self, split: Split) -> None:
        self._images = split.images.split(_CHUNK_IMAGES)
        self._labels = split.labels.split(_CHUNK_IMAGES)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: Any) -> Any:
        return as_floats(self._images[index]), self._labels[index]


def as_floats(images: Tensor) -> Tensor:
    """Return bytes as float32 in [0, 1]."""
    return images.float() / 255.0
