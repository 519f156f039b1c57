"""The parameters of pruned seeds, which must vanish with them."""

import weakref
from collections.abc import Iterable

from torch import nn


class PrunedSeeds:
    """Remembers, by slot, what the last pruned seed's parameters were, without keeping them."""

    def __init__(self) -> None:
        self._parameters: dict[str, list[weakref.ref[nn.Parameter]]] = {}

    def add(self, path: str, parameters: Iterable[nn.Parameter]) -> None:
        """Take note of what must be gone of a slot's seed."""
        self._parameters[path] = [weakref.ref(parameter) for parameter in parameters]

    def alive(self, path: str | None = None) -> list[nn.Parameter]:
        """Return the parameters that somebody still holds, of one slot or of all."""
        chosen = self._parameters if path is None else {path: self._parameters.get(path, [])}
        found = [reference() for references in chosen.values() for reference in references]
        return [parameter for parameter in found if parameter is not None]

    def forget(self, path: str) -> None:
        """Ask no more of a slot."""
        self._parameters.pop(path, None)
