"""Learning when to grow: an environment, rewards, and training a policy (design name: Simic)."""

from esper.rl.env import GrowthEnv
from esper.rl.growth_episode import DecidedOutside, DivergedAtOnceError, GrowthEpisode, HostRun
from esper.rl.rewards import Potential, Reward, RewardConfig
from esper.rl.task_runs import TaskRuns

__all__ = [
    "DecidedOutside",
    "DivergedAtOnceError",
    "GrowthEnv",
    "GrowthEpisode",
    "HostRun",
    "Potential",
    "Reward",
    "RewardConfig",
    "TaskRuns",
]
