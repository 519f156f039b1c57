"""Policies that decide when and where to grow (design names: Tamiyo, Simic)."""

from esper.policies.heuristic import HeuristicConfig, HeuristicPolicy
from esper.policies.named import POLICY_NAMES, named_policy
from esper.policies.random import RandomPolicy
from esper.policies.schedule import SchedulePolicy
from esper.policies.tending import tend

__all__ = [
    "POLICY_NAMES",
    "HeuristicConfig",
    "HeuristicPolicy",
    "RandomPolicy",
    "SchedulePolicy",
    "named_policy",
    "tend",
]
