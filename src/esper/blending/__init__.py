"""Alpha schedules, blend operators and the straight-through function (design name: Kasmina).

Pure functions of tensors and numbers; slots wire them to modules.
"""

from esper.blending.objectives import (
    capped_gradient,
    correlation_gradient,
    proximal_gradient,
)
from esper.blending.operators import SampleGate, blend, operator_increment
from esper.blending.schedule import AlphaController, AlphaState, curve_value
from esper.blending.straight_through import DEFAULT_TRUST_FRACTION, straight_through

__all__ = [
    "DEFAULT_TRUST_FRACTION",
    "AlphaController",
    "AlphaState",
    "SampleGate",
    "blend",
    "capped_gradient",
    "correlation_gradient",
    "curve_value",
    "operator_increment",
    "proximal_gradient",
    "straight_through",
]
