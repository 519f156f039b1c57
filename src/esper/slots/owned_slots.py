"""Slots of one model, and what each of them asks of the others' common affairs."""

from __future__ import annotations  # so that help() says Event, and not all its classes

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakSet

from torch import nn

from esper.lifecycle.actions import BlueprintChoice
from esper.seeds.block_masks import block_masks
from esper.slots.branch import SeedBranch
from esper.slots.breaker import CircuitBreaker
from esper.slots.fitting_blueprints import FittingBlueprints
from esper.slots.gradient_health import GradientHealth
from esper.slots.host_copy import copy_of_host_module
from esper.slots.optimizer_binding import OptimizerBinding
from esper.slots.ownership import OwnershipLedger
from esper.slots.placement import stands_in
from esper.slots.pruned_seeds import PrunedSeeds
from esper.slots.replication import Replication
from esper.slots.sharded import keep_sharded
from esper.slots.slot import SeedSlot


class OwnedSlots(Mapping[str, SeedSlot]):
    """The slots by path, and the `SlotOwner` that each of them asks: ownership, optimizer, caches.

    The base of `SlotSet`, which is what training loops call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ledger = OwnershipLedger(model, self._living_seeds)
        self.gradient_health = GradientHealth()
        self.binding: OptimizerBinding | None = None
        self.replication: Replication | None = None
        """The processes that train copies of the model; None where there is one."""
        self.wrapped: WeakSet[nn.Module] = WeakSet()
        """What wrappers may take, the model or modules around it, whose state callbacks hook."""
        self._shard: Callable[[nn.Module], Any] | None = None
        self._slots: dict[str, SeedSlot] = {}
        self._breakers: dict[str, CircuitBreaker] = {}
        self._fitting = FittingBlueprints()
        self._pruned = PrunedSeeds()
        self._host_parameters: list[nn.Parameter] | None = None
        self._living_slots: tuple[SeedSlot, ...] | None = None
        self._structure = 0

    def __getitem__(self, path: str) -> SeedSlot:
        try:
            return self._slots[path]
        except KeyError:
            known = ", ".join(map(repr, self._slots))
            raise KeyError(f"no slot at {path!r}; slots: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        slots = ", ".join(f"{path!r}: {slot.stage.name}" for path, slot in self._slots.items())
        return f"SlotSet({{{slots}}})"

    def add(self, slot: SeedSlot) -> None:
        """Take in a slot; `attach` does this."""
        self._slots[slot.path] = slot

    def drop(self, slots: Iterable[SeedSlot]) -> None:
        """Let go of those of the slots that are here; `detach` does this where others stay."""
        for slot in slots:
            if self._slots.get(slot.path) is slot:
                del self._slots[slot.path]
        self._note_seeds_changed()

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the parameters only."""
        return self._shard is not None

    @property
    def living_slots(self) -> tuple[SeedSlot, ...]:
        """The slots that hold a living seed, in module order."""
        if self._living_slots is None:
            slots = self._slots.values()
            self._living_slots = tuple(slot for slot in slots if slot.living is not None)
        return self._living_slots

    def host_parameters(self) -> list[nn.Parameter]:
        """Return the host's parameters in the model's order, committed seeds included."""
        if self._host_parameters is None:
            self._host_parameters = self.ledger.host_parameters()
        return self._host_parameters

    def structure(self) -> Hashable:
        """Return what a step's operations depend on, apart from its batch.

        While it stays equal a step runs the same operations on the same shapes.
        """
        return self._structure

    def check_in_place(self, path: str) -> None:
        """Raise RuntimeError if the module that a slot stood behind was replaced by another one."""
        slot = self._slots[path]
        if not stands_in(self.model, slot):
            raise RuntimeError(
                f"slot {path!r} stands in the model's forward no more: the module that it was "
                "attached behind was replaced, as convert_sync_batchnorm and quantisation do; "
                "change the model first, then attach"
            )

    def breaker(self, blueprint: str) -> CircuitBreaker:
        """Return the breaker around building one blueprint."""
        return self._breakers.setdefault(blueprint, CircuitBreaker(f"build {blueprint}"))

    def choices(self, path: str) -> tuple[BlueprintChoice, ...]:
        """Return the blueprints that fit a slot, cheapest first."""
        return self._fitting.of(self._slots[path])

    def check_unshared(self, path: str, seed: nn.Module) -> None:
        """Raise OwnershipError if a new seed shares a parameter."""
        self.ledger.check_seed(owner_name(path), seed)

    def copy_of_host_module(self, name: str) -> nn.Module:
        """Return a copy of a module of the host, without slots and seeds.

        Raises:
            ValueError: As `esper.slots.host_copy`, or the host is sharded.
        """
        if self.sharded:
            raise ValueError(
                f"source={name!r}: the host is sharded, and torch cannot copy a sharded module; "
                "take a blueprint that is built anew"
            )
        return copy_of_host_module(self.model, name)

    def shard(self, branch: SeedBranch) -> None:
        """Shard a seed that is not attached yet as the host is, if it is."""
        if self._shard is not None:
            self._shard(branch)
            keep_sharded(branch)

    def seed_added(self, path: str, branch: SeedBranch, *, state_of: str | None = None) -> None:
        """Give a new seed to the optimizer.

        Args:
            path: Of the slot.
            branch: The seed with its operator.
            state_of: Of the module whose optimizer state its copies begin with; None leaves the
                whole seed without.

        Raises:
            ValueError: There is no optimizer or no state to copy; nothing has changed.
        """
        if state_of is not None:
            self._copy_optimizer_state(state_of, branch)
        self._note_seeds_changed()
        for slot in self._slots.values():
            slot.prepare_seeds()
        if self.binding is not None:
            self.binding.add(path, branch)

    def _copy_optimizer_state(self, source: str, branch: SeedBranch) -> None:
        if self.binding is None:
            raise ValueError(
                f"there is no optimizer to copy the state of {source!r} in; call "
                "slots.bind(optimizer) first, which esper.Growth does"
            )
        originals = dict(self.model.get_submodule(source).named_parameters())
        self.binding.copy_state(
            [
                (originals[name], parameter)
                for copied in branch.seed.copies
                for name, parameter in copied.named_parameters()
            ],
            source=source,
        )

    def seed_removed(self, path: str, branch: SeedBranch) -> None:
        """Take a pruned seed from the optimizer and remember what must be gone."""
        self._note_seeds_changed()
        self._pruned.add(path, branch.parameters())
        self.gradient_health.forget(owner_name(path))
        self._renew_block_masks()
        if self.replication is not None:
            self.replication.forget_failure(path)
        if self.binding is not None:
            self.binding.remove(path, branch)

    def seed_committed(self, path: str, branch: SeedBranch) -> None:
        """Move a committed seed's parameters to the host's group that its slot's is like."""
        self._note_seeds_changed()
        self.gradient_health.forget(owner_name(path))
        if self.replication is not None:
            self.replication.forget_failure(path)
        if self.binding is not None:
            self.binding.commit(path, branch)

    def all_know_failure(self, path: str) -> bool:
        """Return whether all processes that train the model know what a seed has raised."""
        return self.replication is None or self.replication.all_know_failure(path)

    def forward_changes(self) -> None:
        """Take note that a step's operations will be others."""
        self._structure += 1

    def leftovers(self, path: str) -> tuple[str, ...]:
        """Return where anything of the slot's last pruned seed is still found."""
        slot = self._slots[path]
        alive = self._pruned.alive(path)
        in_model = {id(parameter) for parameter in self.model.parameters()}
        found = []
        if slot.living is not None:
            found.append("a living seed")
        if any(id(parameter) in in_model for parameter in alive):
            found.append("parameters in the model")
        if self.binding is not None and any(map(self.binding.holds, alive)):
            found.append("parameters or state in the optimizer")
        if self.gradient_health.holds(owner_name(path)):
            found.append("gradient norms")
        if slot.guarded:
            found.append("gradient hooks")
        if not found:
            self._pruned.forget(path)
        return tuple(found)

    def _note_seeds_changed(self) -> None:
        self._host_parameters = self._living_slots = None
        self._structure += 1

    def _renew_block_masks(self) -> None:
        """Drop every block mask; what the slots' own lengths need is there for compiled graphs."""
        block_masks.clear()
        for slot in self._slots.values():
            slot.prepare_seeds()

    def _living_seeds(self) -> dict[str, nn.Module]:
        return {
            owner_name(slot.path): slot.living
            for slot in self._slots.values()
            if slot.living is not None
        }


def owner_name(path: str) -> str:
    """Return what the seed of a slot is called where parameters have owners."""
    return f"seed of slot {path!r}"
