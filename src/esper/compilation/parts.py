"""A module's parts, and whether they are still those that it had."""

from collections.abc import Iterable

from torch import nn


class Parts:
    """Modules that are in one another; tells whether one was replaced, removed or added.

    Args:
        modules: All of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = tuple(modules)
        places = [part._modules for part in self.modules]  # noqa: SLF001 – no public place
        self._without = [place for place in places if not place]
        self._with = [place for place in places if place]
        self._children = [dict(place) for place in self._with]

    def changed(self) -> bool:
        """Return whether another module stands somewhere in them than did at first."""
        # Modules are equal to themselves alone, and lists and dicts compare without Python's help.
        return any(self._without) or self._with != self._children
