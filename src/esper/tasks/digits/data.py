"""Scikit-learn's handwritten digits: 1,797 real images of 8 by 8 pixels, bundled with it.

Source: UCI Optical Recognition of Handwritten Digits, test set (Alpaydin and Kaynak 1998).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TRAIN_IMAGES = 1000
VALIDATION_IMAGES = 397
BATCH_IMAGES = 50
SHIFT_PIXELS = 1
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images `N 1 8 8` in [0, 1] with their labels `N`."""

    images: Tensor
    labels: Tensor


@cache
def load_splits() -> tuple[Split, Split, Split]:
    """Return training, validation and test split: 1,000, 397 and 400 images, always the same.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 – an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits task needs scikit-learn: pip install 'esper-lite[data]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    parts = order.split([TRAIN_IMAGES, VALIDATION_IMAGES, len(order) - 1397])
    train, validation, test = (Split(images[part], labels[part]) for part in parts)
    return train, validation, test


class ShiftedBatches:
    """Shuffled training batches, each image shifted by up to one pixel in each direction.

    Args:
        random_seed: Fixes order and shifts of all epochs.
    """

    def __init__(self, split: Split, *, random_seed: int) -> None:
        self._split = split
        self.generator = torch.Generator().manual_seed(random_seed)
        """Draws every epoch; a checkpoint keeps where it stands."""

    def __len__(self) -> int:
        return len(self._split.labels) // BATCH_IMAGES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._split.images, self._split.labels
        order = torch.randperm(len(labels), generator=self.generator)
        for indices in order[: len(self) * BATCH_IMAGES].split(BATCH_IMAGES):
            yield shifted(images[indices], self.generator), labels[indices]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image moved by -1, 0 or 1 pixels down and right, zeros moving in.

    Args:
        images: `B 1 8 8`.
        generator: Draws the shifts.
    """
    batch, _, height, width = images.shape
    reach = 2 * SHIFT_PIXELS + 1
    down, right = torch.randint(0, reach, (2, batch, 1), generator=generator)
    padded = F.pad(images[:, 0], (SHIFT_PIXELS,) * 4)
    rows = (torch.arange(height) + down)[:, :, None]
    columns = (torch.arange(width) + right)[:, None, :]
    return padded[torch.arange(batch)[:, None, None], rows, columns].unsqueeze(1)
