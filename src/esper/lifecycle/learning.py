"""How a seed learns, and for how long it is kept apart from the host."""

from enum import StrEnum


class Isolation(StrEnum):
    """The last stage in which the seed reads detached features.

    While a seed is isolated no gradient flows through it into the host, and the host keeps its
    full direct gradient at every alpha. PROBATIONARY is never isolated.
    """

    NONE = "none"
    """Live insertion: at alpha 1 at once; the seed and the host adapt to each other throughout."""
    TRAINING = "training"
    """Isolated while TRAINING, co-adapting from BLENDING on."""
    SHADOWING = "shadowing"
    """Isolated through TRAINING, BLENDING and SHADOWING."""


class SeedObjective(StrEnum):
    """What a TRAINING seed minimises behind the host.

    PROXIMAL adds a pull toward zero to the straight-through gradient; PLAIN does not, and is
    measured to diverge on small hosts.
    """

    PROXIMAL = "proximal"
    PLAIN = "plain"
