"""What decides when and where to grow."""

from collections.abc import Sequence
from typing import Protocol

from esper.lifecycle.actions import Action, GrowthState


class Policy(Protocol):
    """Turns the state after an epoch into actions.

    Actions are carried out in order; each is checked against what is legal when its turn comes, and
    one that is not has no effect and is told as an event.
    """

    @property
    def name(self) -> str:
        """How the policy is called on the command line and in the run record."""

    @property
    def reads_losses(self) -> bool:
        """Whether it decides by the held-out loss itself, beside the gates' probes.

        An evaluation is a cost of growing then, and otherwise none: one that watches.
        """

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return what to do now; an empty sequence waits."""
