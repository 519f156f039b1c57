"""Slots behind a host's modules: attach, grow, measure, detach (design name: Kasmina)."""

from esper.slots.attach import SLOT_NAME, attach, detach, find_slots
from esper.slots.breaker import BreakerState, CircuitBreaker
from esper.slots.config import SlotConfig
from esper.slots.counterfactual import Variant, effective_alpha, fused_losses
from esper.slots.germination import GerminationError
from esper.slots.isolation_monitor import IsolationMonitor, IsolationReading
from esper.slots.ownership import OwnershipError
from esper.slots.slot import CommittedSeed, SeedSlot
from esper.slots.slot_forward import ForwardMode
from esper.slots.slot_set import SlotSet

__all__ = [
    "SLOT_NAME",
    "BreakerState",
    "CircuitBreaker",
    "CommittedSeed",
    "ForwardMode",
    "GerminationError",
    "IsolationMonitor",
    "IsolationReading",
    "OwnershipError",
    "SeedSlot",
    "SlotConfig",
    "SlotSet",
    "Variant",
    "attach",
    "detach",
    "effective_alpha",
    "find_slots",
    "fused_losses",
]
