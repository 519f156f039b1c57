"""The growth engine, the training loop around it and the governor (design name: Tolaria)."""

from esper.training.checkpoints import CheckpointError, CheckpointInfo, Checkpoints
from esper.training.control import RunControl, RunStoppedError
from esper.training.ema import EMA
from esper.training.governor import Governor, GovernorConfig
from esper.training.growth import Growth
from esper.training.held_out import Evaluate, HeldOut, VariantEvaluator
from esper.training.optimizer_state import load_optimizer_state, optimizer_state
from esper.training.policy import FrugalPolicy, Policy
from esper.training.precision import matmul_settings, set_matmul_precision
from esper.training.pretrained import from_pretrained, save_pretrained
from esper.training.probing import AMPLITUDES, probe_seeds
from esper.training.safeguard import TrainingDivergedError
from esper.training.sealed_folder import DamagedFolderError
from esper.training.trainer import DecisionDue, EpochReport, Keeper, Trainer
from esper.training.trainer_config import TrainerConfig

__all__ = [
    "AMPLITUDES",
    "EMA",
    "CheckpointError",
    "CheckpointInfo",
    "Checkpoints",
    "DamagedFolderError",
    "DecisionDue",
    "EpochReport",
    "Evaluate",
    "FrugalPolicy",
    "Governor",
    "GovernorConfig",
    "Growth",
    "HeldOut",
    "Keeper",
    "Policy",
    "RunControl",
    "RunStoppedError",
    "Trainer",
    "TrainerConfig",
    "TrainingDivergedError",
    "VariantEvaluator",
    "from_pretrained",
    "load_optimizer_state",
    "matmul_settings",
    "optimizer_state",
    "probe_seeds",
    "save_pretrained",
    "set_matmul_precision",
]
