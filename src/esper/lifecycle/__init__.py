"""Stages, transitions, gates, actions and events: pure Python, no torch (design name: Leyline).

Everything else in the library depends on these contracts and they depend on nothing of it.
"""

from esper.lifecycle.actions import (
    Action,
    Advance,
    BlueprintChoice,
    Commit,
    Germinate,
    GrowthState,
    IllegalAction,
    LegalAction,
    Operation,
    Prune,
    SetAlphaTarget,
    SlotState,
    Wait,
    check_action,
    legal_actions,
    legal_operations,
    parse_action,
)
from esper.lifecycle.alpha import AlphaCurve, AlphaMode, BlendOperator
from esper.lifecycle.gates import (
    GATE_INTO,
    Check,
    Gate,
    GateInputs,
    GateResult,
    GateThresholds,
    evaluate_gate,
)
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.record import Record
from esper.lifecycle.stages import (
    GROWTH_PATH,
    LIVING_STAGES,
    RECOVERY_PATH,
    TRANSITIONS,
    IllegalTransition,
    SeedStage,
    check_transition,
    next_stage,
)

__all__ = [
    "GATE_INTO",
    "GROWTH_PATH",
    "LIVING_STAGES",
    "RECOVERY_PATH",
    "TRANSITIONS",
    "Action",
    "Advance",
    "AlphaCurve",
    "AlphaMode",
    "BlendOperator",
    "BlueprintChoice",
    "Check",
    "Commit",
    "Gate",
    "GateInputs",
    "GateResult",
    "GateThresholds",
    "Germinate",
    "GrowthState",
    "IllegalAction",
    "IllegalTransition",
    "Isolation",
    "LegalAction",
    "Operation",
    "Prune",
    "Record",
    "SeedObjective",
    "SeedStage",
    "SetAlphaTarget",
    "SlotState",
    "Wait",
    "check_action",
    "check_transition",
    "evaluate_gate",
    "legal_actions",
    "legal_operations",
    "next_stage",
    "parse_action",
]
