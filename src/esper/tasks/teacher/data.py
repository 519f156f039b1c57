"""Inputs, and what a teacher says of them.

Legend: N samples, S stages, P inputs per stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.tasks.teacher.host import NUM_STAGES, STAGE_INPUTS

TRAIN_SAMPLES = 4096
VALIDATION_SAMPLES = 2048
TEST_SAMPLES = 2048
BATCH_SAMPLES = 128
NOISE_STD = 0.1
"""Of what is added to the teacher's answers; its square is the lowest loss there is."""


@dataclass(frozen=True)
class Split:
    """Inputs `N S P`, standard normal, with targets `N`."""

    inputs: Tensor
    targets: Tensor


def make_splits(teacher: nn.Module, random_seed: int) -> tuple[Split, Split, Split]:
    """Return training, validation and test split; the same seed gives the same."""
    generator = torch.Generator().manual_seed(random_seed)
    counts = (TRAIN_SAMPLES, VALIDATION_SAMPLES, TEST_SAMPLES)
    splits = []
    for count in counts:
        inputs = torch.randn(count, NUM_STAGES, STAGE_INPUTS, generator=generator)
        noise = NOISE_STD * torch.randn(count, generator=generator)
        with torch.no_grad():
            splits.append(Split(inputs, teacher(inputs) + noise))
    train, validation, test = splits
    return train, validation, test


class ShuffledBatches:
    """Training batches in a new order every epoch.

    Args:
        random_seed: Fixes the order of all epochs.
    """

    def __init__(self, split: Split, *, random_seed: int) -> None:
        self._split = split
        self.generator = torch.Generator().manual_seed(random_seed)
        """Draws every epoch; a checkpoint keeps where it stands."""

    def __len__(self) -> int:
        return len(self._split.targets) // BATCH_SAMPLES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._split.targets), generator=self.generator)
        for indices in order[: len(self) * BATCH_SAMPLES].split(BATCH_SAMPLES):
            yield self._split.inputs[indices], self._split.targets[indices]
