"""What a learning-rate scheduler remembers, kept with a run and given back to it."""

import copy
from collections.abc import Mapping
from typing import Any


def scheduler_state(scheduler: Any | None) -> dict[str, Any] | None:
    """Return a scheduler's class and a copy of its state; None where there is none."""
    if scheduler is None:
        return None
    return {"class": type(scheduler).__name__, "state": copy.deepcopy(scheduler.state_dict())}


def check_scheduler_state(scheduler: Any | None, state: Mapping[str, Any] | None) -> None:
    """Raise unless a state is of a scheduler of this class, or of none where there is none.

    Args:
        scheduler: Of the trainer that is to go on.
        state: From `scheduler_state`.

    Raises:
        ValueError: The class is another one, or there is one only then or only here.
    """
    again = "make the trainer as it was then"
    if (state is None) != (scheduler is None):
        had = "no" if state is None else "a"
        raise ValueError(f"the run had {had} learning-rate scheduler; {again}")
    kind = type(scheduler).__name__
    if state is not None and kind != state["class"]:
        had = state["class"]
        raise ValueError(f"the run's learning-rate scheduler was a {had}, no {kind}; {again}")


def load_scheduler_state(scheduler: Any | None, state: Mapping[str, Any] | None) -> None:
    """Give a scheduler back what it remembered, as `check_scheduler_state` has found it."""
    if scheduler is not None and state is not None:
        scheduler.load_state_dict(copy.deepcopy(state["state"]))
