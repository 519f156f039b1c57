"""Whether a trainer's state is whole, asked before anything of it is loaded."""

from collections.abc import Mapping
from typing import Any

from esper.slots.state_fields import check_fields

_FIELDS = (
    *("model", "growth", "ema", "governor", "optimizer", "scheduler", "scaler", "data", "control"),
    *("epoch", "losses", "undecided", "metrics"),
)


def check_trainer_state(state: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Raise unless a state has all fields, its slots, and those of some parts all of theirs.

    Args:
        state: From `Trainer.state_dict`.
        parts: What has a state of its own, by its field.

    Raises:
        ValueError: Fields are missing; all of them are named.
    """
    check_fields(state, _FIELDS, of="the trainer")
    check_fields(state["growth"], ("slots",), of="growth")
    check_fields(state["growth"]["slots"], ("slots",), of="the slots")
    for name, part in parts.items():
        check_fields(state[name], part.state_dict(), of=f"the {name}")
