"""The growth engine, the training loop around it and the governor (design name: Tolaria)."""

from esper.training.governor import Governor
from esper.training.growth import Growth
from esper.training.held_out import Evaluate, HeldOut, VariantEvaluator
from esper.training.policy import Policy
from esper.training.precision import matmul_settings, set_matmul_precision
from esper.training.probing import AMPLITUDES, probe_seeds
from esper.training.trainer import EpochReport, Trainer, TrainerConfig

__all__ = [
    "AMPLITUDES",
    "EpochReport",
    "Evaluate",
    "Governor",
    "Growth",
    "HeldOut",
    "Policy",
    "Trainer",
    "TrainerConfig",
    "VariantEvaluator",
    "matmul_settings",
    "probe_seeds",
    "set_matmul_precision",
]
