"""Compiled functions, one for each structure that they compute."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch

MAX_STRUCTURES = 32

_LOG = logging.getLogger(__name__)


class CompiledFunctions:
    """Compiles one function anew for each structure, and drops those unused for longest.

    The compiler keeps its graphs with a function's code, looks through them in turn, and gives up
    on code that has more than a few. So each structure gets code of its own: a few graphs for its
    modes, found at once, and freed with it.

    Args:
        function: A plain function that is not a closure.
        max_structures: How many are kept.
        options: Of torch.compile.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_structures: int = MAX_STRUCTURES,
        options: dict[str, Any],
    ) -> None:
        assert isinstance(function, FunctionType)
        self._function = function
        self._max_structures = max_structures
        self._options = options
        self._compiled: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._number = 0

    def __len__(self) -> int:
        return len(self._compiled)

    def of(self, structure: Hashable) -> Callable[..., Any]:
        """Return the function for a structure; it compiles when it is called."""
        compiled = self._compiled.get(structure)
        if compiled is None:
            self._number += 1
            function = _with_own_code(self._function, self._number)
            compiled = torch.compile(function, **self._options)
            self._compiled[structure] = compiled
            if len(self._compiled) > self._max_structures:
                self._compiled.popitem(last=False)
                _LOG.info(
                    "%s: of more than %d structures the one unused for longest is dropped, and "
                    "compiled anew should it return",
                    self._function.__name__,
                    self._max_structures,
                )
        self._compiled.move_to_end(structure)
        return compiled


def _with_own_code(function: FunctionType, number: int) -> FunctionType:
    """Return a copy; its name is its own, since the compiler remembers shapes by it."""
    return FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{number}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
