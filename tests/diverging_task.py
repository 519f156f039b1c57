"""Digits, of which every fourth run diverges before its first decision."""

import itertools
import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from esper.tasks import TaskSetup
from esper.tasks.digits import DIGITS

ADDRESS = "python:diverging_task:TASK"


def build(random_seed: int) -> TaskSetup:
    """Return the digits task's host and data, with losses of NaN where the seed is 0 of four."""
    setup, numbers = DIGITS.build(random_seed), itertools.count()

    def loss(output: Any, target: Any) -> Tensor:
        bad = random_seed % 4 == 0 and next(numbers) > 3
        return setup.loss(output, target) * (math.nan if bad else 1.0)

    return replace(setup, loss=loss)


TASK = replace(DIGITS, name="diverging", build=build)
