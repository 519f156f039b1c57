"""Choosers: which slot and blueprint the heuristic tries first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from esper.lifecycle.actions import SlotState
from esper.policies.ucb1 import UCB1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A blueprint in a slot.

    Attributes:
        tried: How often it was germinated in this slot.
        committed: How often it was committed, in any slot.
    """

    slot: SlotState
    blueprint: str
    tried: int
    committed: int


class Chooser(Protocol):
    """Puts candidates in order, and is told what became of those that were germinated."""

    def ranked(
        self, candidates: Sequence[Candidate], *, growing: Sequence[Candidate]
    ) -> Sequence[Candidate]:
        """Return the candidates, the first choice first; remembers nothing.

        Args:
            candidates: What may be germinated now: slots in their order, and in each the blueprints
                in theirs; linear maps after all others where the blueprints were not chosen.
            growing: What was germinated and has not ended.
        """

    def note_commit(self, ended: Candidate, contribution_fraction: float | None) -> None:
        """Take note of a seed that became the host's.

        Args:
            ended: What it was.
            contribution_fraction: Of held-out loss, what the seed saved as last measured before,
                standard errors below the mean where a gate judges it so; None if never measured.
        """

    def note_refusal(self, ended: Candidate) -> None:
        """Take note of a seed that was pruned, or could not germinate at all."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what it has taken note of: mappings, lists and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class EvenChooser:
    """Puts first what was tried least, then what was committed most."""

    def ranked(
        self, candidates: Sequence[Candidate], *, growing: Sequence[Candidate]
    ) -> Sequence[Candidate]:
        """Return the candidates, those that are equal in the order given."""
        return sorted(candidates, key=lambda one: (one.tried, -one.committed))

    def note_commit(self, ended: Candidate, contribution_fraction: float | None) -> None:
        """Nothing: candidates tell it themselves."""

    def note_refusal(self, ended: Candidate) -> None:
        """Nothing: candidates tell it themselves."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""


class UCB1Chooser:
    """Puts first the arm that UCB1 would play, an arm being a blueprint in a kind of slot.

    Slots of one kind have the same family and width, and share what is learnt: see `arm_of`. Among
    the slots of an arm the one where it was tried least goes first. A play is a seed's whole life,
    and pays when that ends: nothing for one that was refused, `commit_reward` for one that was
    committed. Seeds that live at the end of a run have paid nothing yet and count as no play.

    Where several seeds live at once, plays begin before earlier ones have paid. That adds to the
    regret, for each arm no more than its gap times the seeds of it that live at once. An arm whose
    first seed grows still is put last, so that slots of one kind try different arms at first.

    Seeds are no dice: what a blueprint is worth drifts as the network grows, and slots are not free
    at all times. `regret_bound` is therefore a yardstick here, and no promise.

    Args:
        bandit: Keeps the books, which may go on from those of another run; None is a new one.

    Source: on late rewards, Joulani, György and Szepesvári, "Online Learning under Delayed
    Feedback", ICML 2013.
    """

    def __init__(self, bandit: UCB1 | None = None) -> None:
        self.bandit = bandit or UCB1()

    def ranked(
        self, candidates: Sequence[Candidate], *, growing: Sequence[Candidate]
    ) -> Sequence[Candidate]:
        """Return the candidates by their arms' indices; untried arms first, in the order given."""
        arms = list(dict.fromkeys(map(arm_of, candidates)))
        awaited = set(map(arm_of, growing)) - set(self.bandit.arms)
        order = sorted(self.bandit.rank(arms), key=lambda arm: arm in awaited)
        places = {arm: place for place, arm in enumerate(order)}
        return sorted(candidates, key=lambda one: (places[arm_of(one)], one.tried))

    def note_commit(self, ended: Candidate, contribution_fraction: float | None) -> None:
        """Pay the arm for a commit."""
        self.bandit.update(arm_of(ended), commit_reward(contribution_fraction))

    def note_refusal(self, ended: Candidate) -> None:
        """Pay the arm nothing."""
        self.bandit.update(arm_of(ended), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the bandit's books."""
        return self.bandit.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: As `UCB1.load_state_dict`.
        """
        self.bandit.load_state_dict(state)


def arm_of(candidate: Candidate) -> str:
    """Return the arm that a candidate plays, as "cnn 8: conv_heavy": family, width, blueprint."""
    slot = candidate.slot
    return f"{slot.family} {slot.dim}: {candidate.blueprint}"


def commit_reward(contribution_fraction: float | None) -> float:
    """Return what a commit pays: 1/2 + c/2, where the seed saves the share c of the held-out loss.

    Half is for the gates, so that a seed that passed them pays more than one that did not; half is
    for what it saves. That is from 0 to 1 for c from -1 to 1; outside, c counts as the nearer end:

    - c is at most 1 where a loss cannot be negative, since no more than all of it can be saved.
      Where it can be, saving more than its size pays as much as saving its size.
    - Gates let no harm pass, but a commit can be forced. A seed that adds the loss's size to it, or
      more, pays what a pruned one does.
    - A seed that was forced through before anything was measured, or whose share is not a number,
      as that of a loss of 0, pays for the commit alone: 1/2.

    Args:
        contribution_fraction: c, as `Chooser.note_commit` is told it.
    """
    if contribution_fraction is None or math.isnan(contribution_fraction):
        return 0.5
    return 0.5 + 0.5 * min(1.0, max(-1.0, contribution_fraction))
