"""Digits, with a host and batches that draw from every global random stream while it trains."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from esper.tasks import TaskSetup
from esper.tasks.digits import DIGITS
from esper.tasks.task import Batches

ADDRESS = "python:drawing_task:TASK"


class NoisyBatches:
    """Batches with noise in their inputs."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            noise = torch.from_numpy(np.random.normal(0.0, 0.1, images.shape))  # noqa: NPY002
            yield images + noise.float() + random.uniform(0.0, 0.1), labels


def build(random_seed: int) -> TaskSetup:
    """Return the digits task's host and data, with dropout and noise."""
    setup = DIGITS.build(random_seed)
    classifier = setup.model.get_submodule("classifier")
    setup.model.add_module("classifier", nn.Sequential(nn.Dropout(0.2), classifier))
    return replace(setup, batches=NoisyBatches(setup.batches))


TASK = replace(DIGITS, name="drawing", build=build)
