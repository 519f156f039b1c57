"""How many seeds a run germinated, committed and pruned."""

from collections.abc import Mapping

from esper.lifecycle.events import EventRecord
from esper.report.story import StoryTeller


class SeedCounts:
    """A sink that counts what became of seeds, without what a way back has undone."""

    def __init__(self) -> None:
        self._teller = StoryTeller()

    @property
    def num_germinated(self) -> int:
        """All of them, those that live on included."""
        return len(self._teller.story.seeds)

    @property
    def num_committed(self) -> int:
        """Those that became a part of the host."""
        return len(self._teller.story.committed)

    @property
    def num_pruned(self) -> int:
        """Those that were removed."""
        return sum(seed.outcome == "pruned" for seed in self._teller.story.seeds)

    def publish(self, record: EventRecord) -> None:
        """Follow the story."""
        self._teller.take(record)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics say nothing of how many seeds there are."""

    def flush(self) -> None:
        """Nothing is kept back."""
