"""The eleven stages of a seed's life and the one table of legal transitions."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class SeedStage(StrEnum):
    """Where a slot's current seed stands in its life."""

    DORMANT = "dormant"
    """No seed; the slot passes features through."""
    GERMINATED = "germinated"
    """Built, probed and registered, not yet in the forward path."""
    TRAINING = "training"
    """Learns behind the host, whose forward and gradients are bitwise its own."""
    BLENDING = "blending"
    """In the forward path with alpha on its way to a target."""
    SHADOWING = "shadowing"
    """At full alpha, frozen, only measured."""
    PROBATIONARY = "probationary"
    """Live at full alpha, training with the host, on trial."""
    FOSSILIZED = "fossilized"
    """Committed: owned by the host for good."""
    PRUNED = "pruned"
    """Removed; the cool-down has not begun."""
    EMBARGOED = "embargoed"
    """Cooling down after a prune, counted in epochs."""
    RESETTING = "resetting"
    """Proving that nothing of the removed seed is left."""
    TERMINATED = "terminated"
    """The slot will not grow again."""


_S = SeedStage

GROWTH_PATH: tuple[SeedStage, ...] = (
    _S.DORMANT,
    _S.GERMINATED,
    _S.TRAINING,
    _S.BLENDING,
    _S.SHADOWING,
    _S.PROBATIONARY,
    _S.FOSSILIZED,
)
"""The stages of a seed that succeeds, in order."""

RECOVERY_PATH: tuple[SeedStage, ...] = (_S.PRUNED, _S.EMBARGOED, _S.RESETTING, _S.DORMANT)
"""The stages of a slot after a prune, in order."""

LIVING_STAGES: frozenset[SeedStage] = frozenset(GROWTH_PATH[1:-1])
"""Stages in which the slot holds a living seed: GERMINATED to PROBATIONARY."""

TRANSITIONS: Mapping[SeedStage, frozenset[SeedStage]] = MappingProxyType(
    {
        _S.DORMANT: frozenset({_S.GERMINATED, _S.TERMINATED}),
        _S.GERMINATED: frozenset({_S.TRAINING, _S.PRUNED}),
        _S.TRAINING: frozenset({_S.BLENDING, _S.PRUNED}),
        _S.BLENDING: frozenset({_S.SHADOWING, _S.PRUNED}),
        _S.SHADOWING: frozenset({_S.PROBATIONARY, _S.PRUNED}),
        _S.PROBATIONARY: frozenset({_S.FOSSILIZED, _S.BLENDING, _S.PRUNED}),
        _S.FOSSILIZED: frozenset({_S.TERMINATED}),
        _S.PRUNED: frozenset({_S.EMBARGOED}),
        _S.EMBARGOED: frozenset({_S.RESETTING}),
        _S.RESETTING: frozenset({_S.DORMANT}),
        _S.TERMINATED: frozenset(),
    }
)
"""Every legal transition. A slot that grows again after a commit starts a new life at DORMANT."""


class IllegalTransition(ValueError):  # noqa: N818 - says what was asked, not what broke
    """A stage change that the table does not list, or that cannot be made now.

    Args:
        current: The stage to leave.
        requested: The stage to enter.
        subject: Who changes stage, as the error should call it.
        problem: What is wrong where the table is not: follows the subject in the error.
    """

    def __init__(
        self, current: SeedStage, requested: SeedStage, *, subject: str, problem: str | None = None
    ) -> None:
        legal = sorted(stage.name for stage in TRANSITIONS[current])
        allowed = ", ".join(legal) if legal else "none: this stage is final"
        not_listed = (
            f"cannot go from {current.name} to {requested.name}; "
            f"legal from {current.name}: {allowed}"
        )
        super().__init__(f"{subject} {problem or not_listed}")
        self.current = current
        self.requested = requested


def check_transition(current: SeedStage, requested: SeedStage, *, subject: str = "seed") -> None:
    """Raise unless `requested` may follow `current`.

    Args:
        current: The stage to leave.
        requested: The stage to enter.
        subject: Who changes stage, as the error should call it.

    Raises:
        IllegalTransition: The pair is not in `TRANSITIONS`; both stages and the legal ones
            are named.
    """
    if requested not in TRANSITIONS[current]:
        raise IllegalTransition(current, requested, subject=subject)


def next_stage(current: SeedStage, *, subject: str = "seed") -> SeedStage:
    """Return the stage that `advance` leads to: one step along the growth or recovery path.

    Raises:
        IllegalTransition: `current` is FOSSILIZED or TERMINATED, which lead nowhere by advancing.
    """
    for path in (GROWTH_PATH, RECOVERY_PATH):
        if current in path[:-1]:
            return path[path.index(current) + 1]
    raise IllegalTransition(current, SeedStage.GERMINATED, subject=subject)
