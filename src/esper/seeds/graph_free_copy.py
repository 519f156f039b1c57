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
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
