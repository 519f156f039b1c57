"""How long steps take, and how much longer with a seed than before it was there."""

import time
from collections.abc import Callable, Mapping

from esper.training.step_timer import StepTimer


class StepTimes:
    """Times the steps of a network that grows; a new seed lets it begin anew, and compare.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._timer = StepTimer(clock)
        self._before: dict[str, float | None] = {}
        """The median step before a slot's last seed was there, by slot."""
        self._network_changes = False
        """The next step is of another network than those that were timed."""

    @property
    def median_seconds(self) -> float | None:
        """The median step, or None before there are enough of them."""
        return self._timer.median_seconds

    def step(self) -> None:
        """Note that a step has ended."""
        if self._network_changes:
            self._timer.restart()
            self._network_changes = False
        self._timer.step()

    def pause(self) -> None:
        """Leave out the time until the next step."""
        self._timer.pause()

    def network_changes(self) -> None:
        """Forget the steps so far when the next one has been made."""
        self._network_changes = True

    def seed_comes(self, path: str) -> None:
        """Remember what a step took without the seed that a slot gets now."""
        self._before[path] = self.median_seconds
        self.network_changes()

    def ratio_with_seed(self, path: str) -> float | None:
        """Return a step's time relative to one before the slot's seed; None if one is unknown."""
        now, before = self.median_seconds, self._before.get(path)
        return now / before if now is not None and before else None

    def state_dict(self) -> dict[str, float | None]:
        """Return what steps took before each slot's seed."""
        return dict(self._before)

    def load_state_dict(self, before: Mapping[str, float | None]) -> None:
        """Go on from there; steps are timed anew."""
        self._before = dict(before)
        self._timer.restart()
        self._network_changes = False
