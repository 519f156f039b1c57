"""Policies that were learned: what they see, what they may do, and how they are kept."""

from esper.policies.learned.action_coder import (
    READ_HEADS,
    SLOT_OPERATIONS,
    ActionChoices,
    ActionCoder,
    Head,
    head_sizes,
    read_table,
)
from esper.policies.learned.features import (
    RUN_FEATURES,
    SLOT_FEATURES,
    ObservationConfig,
    WatchedLoss,
    feature_names,
    features,
    relative_fall,
    relative_size,
)
from esper.policies.learned.joint_distribution import SLOT_HEADS, HeadLogits, JointDistribution
from esper.policies.learned.learned_policy import LearnedPolicy
from esper.policies.learned.network import (
    NUM_RUN_FEATURES,
    NUM_SLOT_FEATURES,
    ActionHeads,
    GrowthNetwork,
    HostEncoder,
    Memory,
    NetworkConfig,
    SeenHost,
    split_features,
    start_lstm,
)
from esper.policies.learned.policy_file import (
    PolicyDocument,
    PolicyFileError,
    SavedPolicy,
    load_policy,
    save_policy,
)

__all__ = [
    "NUM_RUN_FEATURES",
    "NUM_SLOT_FEATURES",
    "READ_HEADS",
    "RUN_FEATURES",
    "SLOT_FEATURES",
    "SLOT_HEADS",
    "SLOT_OPERATIONS",
    "ActionChoices",
    "ActionCoder",
    "ActionHeads",
    "GrowthNetwork",
    "Head",
    "HeadLogits",
    "HostEncoder",
    "JointDistribution",
    "LearnedPolicy",
    "Memory",
    "NetworkConfig",
    "ObservationConfig",
    "PolicyDocument",
    "PolicyFileError",
    "SavedPolicy",
    "SeenHost",
    "WatchedLoss",
    "feature_names",
    "features",
    "head_sizes",
    "load_policy",
    "read_table",
    "relative_fall",
    "relative_size",
    "save_policy",
    "split_features",
    "start_lstm",
]
