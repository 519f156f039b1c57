"""Slots behind a host's modules: attach, grow, measure, detach (design name: Kasmina)."""

from esper.slots.attach import attach, detach, find_slots
from esper.slots.bake import bake
from esper.slots.breaker import BreakerState, CircuitBreaker
from esper.slots.committed_seed import CommittedSeed
from esper.slots.config import SlotConfig
from esper.slots.counterfactual import (
    Imitated,
    Variant,
    effective_alpha,
    fitting_imitations,
    fused_losses,
    weigh,
)
from esper.slots.germination import GerminationError
from esper.slots.grown_module import GrownModule
from esper.slots.isolation_monitor import IsolationMonitor, IsolationReading
from esper.slots.ownership import OwnershipError
from esper.slots.placement import SLOT_NAME
from esper.slots.slot import SeedSlot
from esper.slots.slot_forward import ForwardMode
from esper.slots.slot_set import SlotSet

__all__ = [
    "SLOT_NAME",
    "BreakerState",
    "CircuitBreaker",
    "CommittedSeed",
    "ForwardMode",
    "GerminationError",
    "GrownModule",
    "Imitated",
    "IsolationMonitor",
    "IsolationReading",
    "OwnershipError",
    "SeedSlot",
    "SlotConfig",
    "SlotSet",
    "Variant",
    "attach",
    "bake",
    "detach",
    "effective_alpha",
    "find_slots",
    "fitting_imitations",
    "fused_losses",
    "weigh",
]
