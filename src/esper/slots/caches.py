"""Caches bounded in count and in time, with statistics."""

import time
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from cachetools import TTLCache

ValueT = TypeVar("ValueT")


class CacheStatistics(Protocol):
    """What telemetry tells of a cache."""

    hits: int
    misses: int

    def __len__(self) -> int:
        """Return the number of entries."""


class BoundedCache(Generic[ValueT]):
    """Holds at most `max_entries` values, each for at most `max_age_seconds`."""

    def __init__(
        self,
        *,
        max_entries: int,
        max_age_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries: TTLCache[Hashable, ValueT] = TTLCache(
            max_entries, max_age_seconds, timer=clock
        )
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get_or_make(self, key: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """Return the value under `key`, made and kept if it is missing or too old."""
        try:
            value = self._entries[key]
        except KeyError:
            self.misses += 1
            value = make()
            self._entries[key] = value
            return value
        self.hits += 1
        return value

    def sweep(self) -> None:
        """Drop what is too old."""
        self._entries.expire()

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
