"""What stays on record of a seed that the host took over."""

from typing import Any

from esper.lifecycle.alpha import BlendOperator
from esper.lifecycle.record import Record


class CommittedSeed(Record):
    """What the host took over from a slot; enough to build the same structure again."""

    blueprint: str
    options: dict[str, Any]
    blend_operator: BlendOperator
    param_count: int
    contribution_fraction: float | None
    """As gates last judged it: see `GateInputs`."""
