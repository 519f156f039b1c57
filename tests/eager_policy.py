"""A policy in a file that has learned nothing, and grows whatever it decides for."""

from pathlib import Path

import torch

from esper.lifecycle import Operation
from esper.policies.learned import SLOT_OPERATIONS, GrowthNetwork, save_policy

_LIKED = (Operation.GERMINATE, Operation.COMMIT, Operation.ADVANCE)
"""The most first; what else may be done is not."""


def write_eager_policy(path: Path, random_seed: int = 0) -> str:
    """Write one; return the SHA-256 of its file."""
    torch.manual_seed(random_seed)
    network = GrowthNetwork(("conv_light", "norm"))
    with torch.no_grad():
        for place, operation in enumerate(_LIKED):
            bias = float(len(_LIKED) - place)
            network.heads.operations.bias[SLOT_OPERATIONS.index(operation)] = bias
    return save_policy(path, network)
