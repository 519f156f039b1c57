"""What a slot asks of the set it belongs to."""

from typing import TYPE_CHECKING, Protocol

from torch import nn

from esper.lifecycle.actions import BlueprintChoice
from esper.slots.branch import SeedBranch
from esper.slots.breaker import CircuitBreaker

if TYPE_CHECKING:
    from esper.slots.slot import SeedSlot


class SlotOwner(Protocol):
    """What a slot asks of the set it belongs to."""

    def breaker(self, blueprint: str) -> CircuitBreaker:
        """Return the breaker around building this blueprint."""

    def choices(self, slot: "SeedSlot") -> tuple[BlueprintChoice, ...]:
        """Return the blueprints that fit, cheapest first."""

    def check_unshared(self, slot: "SeedSlot", seed: nn.Module) -> None:
        """Raise if the seed shares a parameter with another owner."""

    def seed_added(self, slot: "SeedSlot", branch: SeedBranch) -> None:
        """Take note that a seed was registered."""

    def seed_removed(self, slot: "SeedSlot", branch: SeedBranch) -> None:
        """Take note that a seed was removed."""

    def seed_committed(self, slot: "SeedSlot", branch: SeedBranch) -> None:
        """Take note that a seed passed to the host."""

    def leftovers(self, slot: "SeedSlot") -> tuple[str, ...]:
        """Return what is still found of the last removed seed."""
