"""Deep copies of modules that hold on to what their forward has computed."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


def graph_free_copy(value: T, memo: dict[int, Any] | None = None) -> T:
    """Return a deep copy, in which what hooks and forwards have computed and kept is in no graph.

    Pruned weights are, attention maps that a block keeps, and losses that a host collects in a
    list: torch refuses to copy those.

    Args:
        value: What is copied.
        memo: As of `copy.deepcopy`: what to put in place of some objects, by their ids.
    """
    with _CopiesComputed():
        return copy.deepcopy(value, memo)


class _CopiesComputed(TorchFunctionMode):
    """Lets a tensor that is in a graph be copied, out of it, wherever a deep copy comes upon it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or not _holds_graph(args[0]):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        copied = memo[id(tensor)] = tensor.detach().clone()
        if tensor.is_leaf:
            copied.requires_grad_(tensor.requires_grad)
            copied.grad = None if tensor.grad is None else tensor.grad.detach().clone()
            with self:  # which is off in here
                vars(copied).update(copy.deepcopy(vars(tensor), memo))
        return copied


def _holds_graph(tensor: Tensor) -> bool:
    """Return whether a tensor, its gradient or one of its attributes is in a graph."""
    if not tensor.is_leaf:
        return True
    held = (tensor.grad, *vars(tensor).values())
    return any(isinstance(one, Tensor) and not one.is_leaf for one in held)
