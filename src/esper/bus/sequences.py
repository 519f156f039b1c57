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

    def take(self, producer: str, numbers: range) -> bool:
        """Remember that messages have come together, and return whether they are new.

        They are not, and nothing is remembered, if one of them has come before.

        Raises:
            ValueError: There are none, or a number is below 1.
        """
        if not numbers or numbers.step != 1 or numbers[0] < 1:
            raise ValueError(f"sequence numbers count from 1, got {numbers} of {producer}")
        known = self._producers.get(producer)
        if known is None:
            known = self._producers[producer] = _Sequence()
        before = known.missing
        new = known.take(numbers[0], numbers[-1], self._max_gaps)
        self._missing += known.missing - before
        return new

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

    def take(self, begin: int, end: int, max_gaps: int) -> bool:
        """Take the numbers from `begin` to `end`, both included."""
        first, last = self._first, self._last
        if begin == last[-1] + 1:  # nearly all of them
            last[-1] = end
            return True
        if begin > last[-1]:
            self.missing += begin - last[-1] - 1
            first.append(begin)
            last.append(end)
            if len(first) > max_gaps + 1:
                del first[1], last[0]
            return True
        index = bisect_right(first, begin) - 1
        if begin <= last[index] or (index + 1 < len(first) and end >= first[index + 1]):
            return False
        self.missing -= end - begin + 1
        follows, leads = begin == last[index] + 1, end == first[index + 1] - 1
        if follows and leads:
            del first[index + 1], last[index]
        elif follows:
            last[index] = end
        elif leads:
            first[index + 1] = begin
        else:
            first.insert(index + 1, begin)
            last.insert(index + 1, end)
            if len(first) > max_gaps + 1:
                del first[1], last[0]
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"first": [*self._first], "last": [*self._last], "missing": self.missing}
