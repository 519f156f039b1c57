"""What a slot asks of the set it belongs to; it says who it is by its path."""

from typing import Protocol

from torch import nn

from esper.lifecycle.actions import BlueprintChoice
from esper.slots.branch import SeedBranch
from esper.slots.breaker import CircuitBreaker


class SlotOwner(Protocol):
    """What a slot asks of the set it belongs to."""

    def check_in_place(self, path: str) -> None:
        """Raise if the slot stands in the model's forward no more."""

    def breaker(self, blueprint: str) -> CircuitBreaker:
        """Return the breaker around building this blueprint."""

    def choices(self, path: str) -> tuple[BlueprintChoice, ...]:
        """Return the blueprints that fit, cheapest first."""

    def check_unshared(self, path: str, seed: nn.Module) -> None:
        """Raise if the seed shares a parameter with another owner."""

    def copy_of_host_module(self, name: str) -> nn.Module:
        """Return a copy of a module of the host, without slots and seeds."""

    def shard(self, branch: SeedBranch) -> None:
        """Shard a seed that is not attached yet as the host is, if it is."""

    def seed_added(self, path: str, branch: SeedBranch, *, state_of: str | None = None) -> None:
        """Take note that a seed was registered.

        Args:
            path: Of the slot.
            branch: The seed with its operator.
            state_of: Of the module whose optimizer state its copies begin with.
        """

    def seed_removed(self, path: str, branch: SeedBranch) -> None:
        """Take note that a seed was removed."""

    def seed_committed(self, path: str, branch: SeedBranch) -> None:
        """Take note that a seed passed to the host."""

    def all_know_failure(self, path: str) -> bool:
        """Return whether all processes that train the model know what a seed has raised."""

    def forward_changes(self) -> None:
        """Take note that what a slot's forward does changes for good."""

    def leftovers(self, path: str) -> tuple[str, ...]:
        """Return what is still found of the last removed seed."""
