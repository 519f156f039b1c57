"""Seeds and the registry of blueprints they are built from (design name: Kasmina blueprints).

A seed is a module `x + f(x)` with `f` exactly zero at birth; a blueprint is one registered
function that builds it for a width.
"""

from esper.seeds import cnn, transformer
from esper.seeds.identity import scale_output_, zero_initialise_
from esper.seeds.normalization import group_count, group_norm
from esper.seeds.registry import (
    ENTRY_POINT_GROUP,
    Blueprint,
    BlueprintError,
    BlueprintRegistry,
    Family,
    blueprints,
)
from esper.seeds.seed import ContextualSeed, Seed

__all__ = [
    "ENTRY_POINT_GROUP",
    "Blueprint",
    "BlueprintError",
    "BlueprintRegistry",
    "ContextualSeed",
    "Family",
    "Seed",
    "blueprints",
    "cnn",
    "group_count",
    "group_norm",
    "scale_output_",
    "transformer",
    "zero_initialise_",
]
