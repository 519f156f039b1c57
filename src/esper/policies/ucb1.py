"""UCB1: which arm to play next, where each play pays from 0 to 1."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, model_validator

from esper.lifecycle.record import Record


class PlayedArm(Record):
    """What is known of an arm that was played."""

    plays: Annotated[int, Field(ge=1)]
    total: Annotated[FiniteFloat, Field(ge=0.0)]
    """Sum of its rewards."""

    @property
    def mean(self) -> float:
        """Its mean reward."""
        return self.total / self.plays

    @model_validator(mode="after")
    def _pays_at_most_one_a_play(self) -> "PlayedArm":
        if self.total > self.plays:
            raise ValueError(
                f"{self.plays} plays pay at most {self.plays}, got a total of {self.total}"
            )
        return self


class UCB1:
    """Ranks arms by an upper bound of their mean reward, and keeps the books of what they paid.

    The index of an arm is mean + exploration · sqrt(ln t / n): n plays of it, t plays in all. One
    that was never played comes before all that were. Arms are whatever names are asked about; they
    may come and go, and t counts the plays of every one.

    Args:
        exploration: Factor of the bound's width, at least 0. The square root of 2 is that of the
            theorem behind `regret_bound`; 0 takes the best mean so far.

    Raises:
        ValueError: `exploration` is negative or not finite.

    Source: Auer, Cesa-Bianchi and Fischer, "Finite-time Analysis of the Multiarmed Bandit Problem",
    Machine Learning 47 (2002), UCB1, which has the same arms in every play.
    """

    def __init__(self, exploration: float = math.sqrt(2.0)) -> None:
        if not (math.isfinite(exploration) and exploration >= 0.0):
            raise ValueError(f"exploration must be finite and at least 0, got {exploration}")
        self.exploration = exploration
        self._arms: dict[str, PlayedArm] = {}

    @property
    def arms(self) -> Mapping[str, PlayedArm]:
        """What is known of each arm that was played, in the order of their first plays."""
        return MappingProxyType(self._arms)

    @property
    def plays(self) -> int:
        """How many plays there were, of all arms."""
        return sum(arm.plays for arm in self._arms.values())

    @property
    def total(self) -> float:
        """Sum of all rewards."""
        return math.fsum(arm.total for arm in self._arms.values())

    def index(self, arm: str) -> float:
        """Return the upper bound that an arm is ranked by; infinite before its first play."""
        played = self._arms.get(arm)
        if played is None:
            return math.inf
        return played.mean + self.exploration * math.sqrt(math.log(self.plays) / played.plays)

    def rank(self, arms: Sequence[str]) -> list[str]:
        """Return the arms, the one to play first; those that are equal stay in the order given."""
        return sorted(arms, key=self.index, reverse=True)

    def update(self, arm: str, reward: float) -> None:
        """Note a play and what it paid.

        Raises:
            ValueError: The reward is not from 0 to 1; nothing has changed.
        """
        if not 0.0 <= reward <= 1.0:
            raise ValueError(
                f"arm {arm!r} got the reward {reward}; UCB1 takes rewards from 0 to 1, scale it"
            )
        played = self._arms.get(arm)
        plays, total = (0, 0.0) if played is None else (played.plays, played.total)
        self._arms[arm] = PlayedArm(plays=plays + 1, total=total + reward)

    def pseudo_regret(self, means: Mapping[str, float]) -> float:
        """Return what the plays cost in expectation against the best arm alone.

        It is the sum of n · gap over the arms: n plays of each, gap how far its mean lies below the
        highest one.

        Args:
            means: True mean reward by arm, each from 0 to 1; those never played may be among them.

        Raises:
            ValueError: There are none, one is not from 0 to 1, or that of a played arm is missing.
        """
        gaps = _gaps(means)
        for arm in self._arms:
            if arm not in gaps:
                raise ValueError(
                    f"arm {arm!r} was played, and its mean is not given; means are of: "
                    f"{', '.join(map(repr, gaps))}"
                )
        return math.fsum(played.plays * gaps[arm] for arm, played in self._arms.items())

    def empirical_regret(self) -> float:
        """Return how much less was paid than the best mean so far would have paid in all plays.

        That mean is itself measured: unlike the pseudo-regret this may fall as well as rise.
        """
        best = max((arm.mean for arm in self._arms.values()), default=0.0)
        return self.plays * best - self.total

    def state_dict(self) -> dict[str, Any]:
        """Return the books, as plain JSON values."""
        return {"arms": {arm: played.model_dump() for arm, played in self._arms.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: An arm has no plays, or was paid what none can be; nothing has changed.
        """
        self._arms = {arm: PlayedArm.from_dump(played) for arm, played in state["arms"].items()}


def regret_bound(means: Mapping[str, float], plays: int) -> float:
    """Return what the expected pseudo-regret of UCB1 is at most.

    8 · Σ ln n / gap + (1 + π² / 3) · Σ gap, over the arms whose mean is not the highest: n plays in
    all, gap how far an arm's mean lies below the highest one. It holds for an exploration of
    sqrt(2), for arms that can all be played at any time and whose rewards do not drift.

    Args:
        means: True mean reward by arm, each from 0 to 1.
        plays: In all, at least 1.

    Raises:
        ValueError: There are no means, one is not from 0 to 1, or there are no plays.

    Source: Auer, Cesa-Bianchi and Fischer (2002), theorem 1.
    """
    if plays < 1:
        raise ValueError(f"the bound holds from the first play on, got {plays} plays")
    gaps = [gap for gap in _gaps(means).values() if gap > 0.0]
    growing = 8.0 * math.fsum(math.log(plays) / gap for gap in gaps)
    return growing + (1.0 + math.pi**2 / 3.0) * math.fsum(gaps)


def _gaps(means: Mapping[str, float]) -> dict[str, float]:
    """Return how far each mean lies below the highest one.

    Raises:
        ValueError: There are none, or one is not from 0 to 1.
    """
    if not means:
        raise ValueError("means must hold the mean reward of one arm at least, got none")
    for arm, mean in means.items():
        if not 0.0 <= mean <= 1.0:
            raise ValueError(f"the mean reward of arm {arm!r} must be from 0 to 1, got {mean}")
    best = max(means.values())
    return {arm: best - mean for arm, mean in means.items()}
