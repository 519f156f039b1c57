"""Grow neural networks while they train: slots, seeds, gates, policies."""

from esper.lifecycle import SeedStage
from esper.policies import HeuristicConfig, HeuristicPolicy, PlannedPolicy, RandomPolicy
from esper.seeds import Seed, blueprints
from esper.slots import SeedSlot, SlotConfig, SlotSet, attach, bake, detach
from esper.training import (
    EMA,
    Growth,
    HeldOut,
    Policy,
    Trainer,
    TrainerConfig,
    from_pretrained,
    save_pretrained,
)

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Growth",
    "HeldOut",
    "HeuristicConfig",
    "HeuristicPolicy",
    "PlannedPolicy",
    "Policy",
    "RandomPolicy",
    "Seed",
    "SeedSlot",
    "SeedStage",
    "SlotConfig",
    "SlotSet",
    "Trainer",
    "TrainerConfig",
    "attach",
    "bake",
    "blueprints",
    "detach",
    "from_pretrained",
    "save_pretrained",
]
