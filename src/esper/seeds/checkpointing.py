"""Activation checkpointing of a seed's increment: less memory, one more forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def compute(
    function: Callable[..., Tensor],
    *args: Any,
    owner: nn.Module,
    checkpointing: bool,
    **kwargs: Any,
) -> Tensor:
    """Run an increment's function, keeping only its input for the backward if asked to.

    Args:
        function: Computes the increment; the residual addition stays outside of it.
        args: Passed to the function, features first.
        owner: The seed; nothing is recomputed while it is in eval mode or gradients are off.
        checkpointing: Whether the user opted in.
        kwargs: Passed to the function.
    """
    if checkpointing and owner.training and torch.is_grad_enabled():
        output: Tensor = checkpoint(function, *args, use_reentrant=False, **kwargs)
        return output
    return function(*args, **kwargs)
