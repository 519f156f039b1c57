"""How alpha moves and how a seed's increment is mixed into the host's features."""

from enum import StrEnum


class AlphaMode(StrEnum):
    """What the alpha controller is doing."""

    HOLD = "hold"
    UP = "up"
    DOWN = "down"


class AlphaCurve(StrEnum):
    """The shape of an alpha ramp over its steps."""

    LINEAR = "linear"
    COSINE = "cosine"
    SIGMOID = "sigmoid"


class BlendOperator(StrEnum):
    """Which increment `u` the output `h + alpha * u` uses; `f` is the seed's own increment.

    ADD: u = f. MULTIPLY: u = h * tanh(f). GATE: u = gate * f, with a learned gate per sample.
    """

    ADD = "add"
    MULTIPLY = "multiply"
    GATE = "gate"
