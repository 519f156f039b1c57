"""Which messages have come, each once, and how many are missing."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Self

_MAX_GAPS = 1_000


class SequenceTracker:
    """Remembers the sequence numbers of each producer, which count up from 1.

    They may come in any order, and more than once. Memory follows from the number of gaps, not of
    messages: a million missing in a row are one gap. Of a producer that has more gaps than are
    kept the oldest are closed, and what was missing in them is missing for good.

    Args:
        max_gaps: Of each producer.
    """

    def __init__(self, *, max_gaps: int = _MAX_GAPS) -> None:
        self._max_gaps = max_gaps
        self._producers: dict[str, _Sequence] = {}
        self._missing = 0

    def take(self, producer: str, sequence: int) -> bool:
        """Remember that a message has come, and return whether it is new.

        Raises:
            ValueError: The sequence number is below 1.
        """
        if sequence < 1:
            raise ValueError(f"sequence numbers count from 1, got {sequence} of {producer}")
        known = self._producers.get(producer)
        if known is None:
            known = self._producers[producer] = _Sequence()
        before = known.missing
        new = known.take(sequence, self._max_gaps)
        self._missing += known.missing - before
        return new

    def knows(self, producer: str) -> bool:
        """Return whether any message of a producer has come."""
        return producer in self._producers

    @property
    def missing(self) -> int:
        """How many have not come, although later ones of the same producer have."""
        return self._missing

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as JSON values."""
        return {name: known.state_dict() for name, known in self._producers.items()}

    @classmethod
    def load(cls, state: Mapping[str, Any], *, max_gaps: int = _MAX_GAPS) -> Self:
        """Return a tracker that remembers what another one did, by its `state_dict`."""
        tracker = cls(max_gaps=max_gaps)
        for name, known in state.items():
            tracker._producers[name] = _Sequence(known["first"], known["last"], known["missing"])
        tracker._missing = sum(known.missing for known in tracker._producers.values())
        return tracker


class _Sequence:
    """The numbers of one producer that have come, as intervals; a 0 comes before all of them."""

    def __init__(
        self, first: list[int] | None = None, last: list[int] | None = None, missing: int = 0
    ) -> None:
        self._first = [0] if first is None else [*first]
        self._last = [0] if last is None else [*last]
        self.missing = missing

    def take(self, number: int, max_gaps: int) -> bool:
        first, last = self._first, self._last
        if number == last[-1] + 1:  # nearly all of them
            last[-1] = number
            return True
        if number > last[-1]:
            self.missing += number - last[-1] - 1
            first.append(number)
            last.append(number)
            if len(first) > max_gaps + 1:
                del first[1], last[0]
            return True
        index = bisect_right(first, number) - 1
        if number <= last[index]:
            return False
        self.missing -= 1
        follows, leads = number == last[index] + 1, number == first[index + 1] - 1
        if follows and leads:
            del first[index + 1], last[index]
        elif follows:
            last[index] = number
        elif leads:
            first[index + 1] = number
        else:
            first.insert(index + 1, number)
            last.insert(index + 1, number)
            if len(first) > max_gaps + 1:
                del first[1], last[0]
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"first": [*self._first], "last": [*self._last], "missing": self.missing}
