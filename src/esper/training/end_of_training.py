"""What a caller is told where training ends."""

import warnings

from esper.slots.slot_set import SlotSet


def warn_of_living(slots: SlotSet) -> None:
    """Warn once if training ends with seeds of which nothing is decided, in the first process."""
    if slots.replication is not None and slots.replication.rank > 0:
        return
    living = [
        f"{slot.living.blueprint!r} in {path!r} ({slot.stage.name})"
        for path, slot in slots.items()
        if slot.living is not None
    ]
    if living:
        warnings.warn(
            f"training has ended with living seeds: {', '.join(living)}. esper.bake and "
            "esper.save_pretrained refuse those that are in the forward path, and leave the others "
            "out: call slots[path].commit() to keep one that is PROBATIONARY, "
            "slots[path].prune() to remove one; any other needs longer training to be judged",
            stacklevel=3,
        )


def warn_of_no_epochs_left(epochs: int) -> None:
    """Warn that a trainer has trained for all of its epochs already."""
    warnings.warn(
        f"all {epochs} epochs are trained, and nothing was left to do; to train longer make a "
        "Trainer with more epochs, and let it go on from this one's state: "
        "longer.load_state_dict(trainer.state_dict())",
        stacklevel=3,
    )
