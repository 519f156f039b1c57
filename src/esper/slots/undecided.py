"""Living seeds in the forward path, of which nothing is decided: no plain module can hold them."""

from collections.abc import Iterable

from esper.slots.slot import SeedSlot


def refuse_undecided(slots: Iterable[SeedSlot], doing: str) -> None:
    """Raise ValueError if a living seed takes part in the output.

    Args:
        slots: Of a model.
        doing: What must wait, for the message: `"baking"`.
    """
    undecided = [f"{slot.path!r} ({slot.stage.name})" for slot in slots if slot.in_forward_path]
    if undecided:
        raise ValueError(
            f"slots {', '.join(undecided)} hold living seeds in the forward path; before {doing}, "
            "slots[path].commit() keeps one that is PROBATIONARY, slots[path].advance(force=True) "
            "until it is FOSSILIZED keeps one of an earlier stage without asking its gates, and "
            "slots[path].prune() removes any"
        )
