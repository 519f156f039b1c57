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

    All but SHADOW cost no forward: they follow the gradient g of the host's loss at the slot's
    output, which is the loss linearised at alpha 0. docs/objective.md derives and compares them.
    """

    PROXIMAL = "proximal"
    """⟨g, u⟩ with a pull of the increment u toward zero."""
    NORM_CAP = "norm_cap"
    """⟨g, u⟩ on the ball of increments that are no larger than a fraction of the features."""
    CORRELATION = "correlation"
    """⟨g, u⟩ / ‖u‖: the direction only, the amplitude is left to the line search."""
    PLAIN = "plain"
    """⟨g, u⟩, which has no minimum: measured to diverge."""
    SHADOW = "shadow"
    """The loss itself at full alpha, from one more forward and backward beside each step."""
