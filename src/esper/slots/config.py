"""What can be set for each slot."""

from enum import StrEnum
from typing import Annotated, Self, TypeVar

from pydantic import Field, FiniteFloat, model_validator

from esper.blending.straight_through import DEFAULT_TRUST_FRACTION
from esper.lifecycle.alpha import AlphaCurve, BlendOperator
from esper.lifecycle.gates import GateThresholds
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.record import Record

Positive = Annotated[FiniteFloat, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0)]
ChoiceT = TypeVar("ChoiceT", bound=StrEnum)


class SlotConfig(Record):
    """Settings of a slot; every seed that grows in it uses them."""

    blend_operator: BlendOperator = BlendOperator.ADD
    isolation: Isolation = Isolation.NONE
    """NONE is live insertion: no objective behind the host ended clearly lower in
    benchmarks/seed_objective.py, and some time is saved. SHADOWING keeps the host untouched until a
    seed has shown on held-out data that it helps."""
    objective: SeedObjective = SeedObjective.PROXIMAL
    """What an isolated seed learns by while TRAINING."""
    trust_fraction: Positive = DEFAULT_TRUST_FRACTION
    """c of the objective: the increment's size relative to the features."""
    learning_rate_multiplier: Positive = 1.0
    """The seed's learning rate over that of the host's first parameter group."""
    warmup_steps: Count = 0
    """Optimizer steps over which a new seed's learning rate rises linearly from 0."""
    ramp_steps: Count = 50
    """Steps of the default ramp to alpha 1."""
    ramp_curve: AlphaCurve = AlphaCurve.COSINE
    embargo_epochs: Count = 2
    """Epochs a slot rests after a prune."""
    max_committed: Annotated[int, Field(ge=1)] = 4
    """Seeds that may be committed here before the slot is TERMINATED."""
    random_seed: int = 0
    """With the slot's path and the number of its seeds so far, fixes a seed's initial weights."""
    thresholds: GateThresholds = GateThresholds()

    @model_validator(mode="after")
    def _objective_is_used(self) -> Self:
        """Refuse an objective that a live seed would never learn by."""
        behind = {"objective": self.objective, "trust_fraction": self.trust_fraction}
        if self.isolation is not Isolation.NONE:
            return self
        for name, value in behind.items():
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={value} is for seeds that train behind the host; a live seed, "
                    "isolation='none', never does: add isolation='shadowing' or 'training'"
                )
        return self


def choose(kind: type[ChoiceT], value: ChoiceT | str, noun: str) -> ChoiceT:
    """Return the member that `value` is or names.

    Raises:
        ValueError: It is none; the known ones are listed.
    """
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"unknown {noun} {value!r}; known: {', '.join(kind)}") from None


def choose_curve(value: AlphaCurve | str) -> AlphaCurve:
    """Return the curve that `value` is or names.

    Raises:
        ValueError: It is none; the known ones are listed, and what to do for another shape.
    """
    try:
        return choose(AlphaCurve, value, "curve")
    except ValueError as error:
        raise ValueError(
            f"{error}; for another one call set_alpha_target(alpha, steps=0) after each step"
        ) from None
