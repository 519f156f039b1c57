"""Policies that decide when and where to grow (design names: Tamiyo, Simic)."""

from esper.policies.depth_schedule import DepthScheduleConfig, DepthSchedulePolicy, slope_policy
from esper.policies.heuristic import HeuristicConfig, HeuristicPolicy
from esper.policies.named import POLICY_NAMES, named_policy
from esper.policies.random import RandomPolicy
from esper.policies.replay import ReplayPolicy
from esper.policies.schedule import SchedulePolicy
from esper.policies.tending import asked_to_be_weighed, tend
from esper.policies.timing import FractionTiming, GrowthTiming, SlopeTiming

__all__ = [
    "POLICY_NAMES",
    "DepthScheduleConfig",
    "DepthSchedulePolicy",
    "FractionTiming",
    "GrowthTiming",
    "HeuristicConfig",
    "HeuristicPolicy",
    "RandomPolicy",
    "ReplayPolicy",
    "SchedulePolicy",
    "SlopeTiming",
    "asked_to_be_weighed",
    "named_policy",
    "slope_policy",
    "tend",
]
