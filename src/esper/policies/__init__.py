"""Policies that decide when and where to grow (design names: Tamiyo, Simic)."""

from esper.policies.chooser import Candidate, Chooser, EvenChooser, UCB1Chooser
from esper.policies.growth_schedule import GrowthScheduleConfig, GrowthSchedulePolicy, slope_policy
from esper.policies.heuristic import HeuristicConfig, HeuristicPolicy, ucb1_policy
from esper.policies.learned import LearnedPolicy, PolicyFileError
from esper.policies.named import POLICY_NAMES, named_policy
from esper.policies.planned import PlannedPolicy
from esper.policies.random import RandomPolicy
from esper.policies.replay import ReplayPolicy
from esper.policies.tending import asked_to_be_weighed, tend
from esper.policies.timing import FractionTiming, GrowthTiming, SlopeTiming
from esper.policies.ucb1 import UCB1, PlayedArm, regret_bound

__all__ = [
    "POLICY_NAMES",
    "UCB1",
    "Candidate",
    "Chooser",
    "EvenChooser",
    "FractionTiming",
    "GrowthScheduleConfig",
    "GrowthSchedulePolicy",
    "GrowthTiming",
    "HeuristicConfig",
    "HeuristicPolicy",
    "LearnedPolicy",
    "PlannedPolicy",
    "PlayedArm",
    "PolicyFileError",
    "RandomPolicy",
    "ReplayPolicy",
    "SlopeTiming",
    "UCB1Chooser",
    "asked_to_be_weighed",
    "named_policy",
    "regret_bound",
    "slope_policy",
    "tend",
    "ucb1_policy",
]
