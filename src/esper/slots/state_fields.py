"""Whether a state that is to be loaded is whole, asked before anything changes."""

from collections.abc import Iterable, Mapping
from typing import Any


def check_fields(state: Mapping[str, Any], fields: Iterable[str], *, of: str) -> None:
    """Raise unless a state has all fields.

    Args:
        state: That is to be loaded.
        fields: That it must have.
        of: What it is the state of, for the error.

    Raises:
        ValueError: Fields are missing; all of them are named.
    """
    missing = [field for field in fields if field not in state]
    if missing:
        raise ValueError(
            f"the state of {of} lacks {', '.join(missing)}; load all that state_dict() returned"
        )
