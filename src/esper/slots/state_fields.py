"""Whether a state that is to be loaded is whole, asked before anything changes."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from esper.slots.breaker import CircuitBreaker
from esper.slots.modes import SeparateRandomStream

_SET_FIELDS = ("slots", "gradient_health", "breakers", "binding")
_SLOT_FIELDS = ("slot", "nonfinite_steps", "random_stream")


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


def check_set_state(
    state: Mapping[str, Any], paths: Collection[str], *, health_fields: Iterable[str]
) -> None:
    """Raise unless the state of a model's slots is whole and theirs.

    Args:
        state: As `SlotSet.state_dict` returns it.
        paths: Of the slots, in their order.
        health_fields: That the state of the gradient norms has.

    Raises:
        ValueError: The slots are others, or a field is missing.
    """
    check_fields(state, _SET_FIELDS, of="the slots")
    check_slot_states(state["slots"], paths)
    health, binding = state["gradient_health"], state["binding"]
    check_fields(health, health_fields, of="gradient_health")
    for owner, norms in health["norms"].items():
        check_fields(norms, ("host", "seed"), of=f"the gradient norms of the {owner}")
    for name, kept in state["breakers"].items():
        check_fields(kept, CircuitBreaker(name).state_dict(), of=f"the breaker {name!r}")
    if binding is not None:
        check_fields(binding, ("steps",), of="the binding")
        check_fields(binding["steps"], paths, of="the binding's steps")


def check_slot_states(states: Mapping[str, Mapping[str, Any]], paths: Collection[str]) -> None:
    """Raise unless states are those of the slots, and whole.

    Args:
        states: By path, as `SeedSlot.growth_state` returns them.
        paths: Of the slots, in their order.

    Raises:
        ValueError: The slots are others, or a field is missing.
    """
    if list(states) != list(paths):
        raise ValueError(
            f"the slots were {', '.join(states)}, and are {', '.join(paths)}; attach to the same "
            "targets in the same order"
        )
    stream_fields = SeparateRandomStream(0).state_dict()
    for path, kept in states.items():
        check_fields(kept, _SLOT_FIELDS, of=f"slot {path!r}")
        stream = kept["random_stream"]
        if stream is not None:
            check_fields(stream, stream_fields, of=f"the random stream of slot {path!r}")
