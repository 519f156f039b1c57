"""What of a slot is not in the model's state dict: enough to build its seeds again and go on."""

from collections.abc import Iterator
from typing import Any, Self

from esper.blending.schedule import AlphaState
from esper.lifecycle.alpha import BlendOperator
from esper.lifecycle.record import Record
from esper.lifecycle.stages import SeedStage
from esper.seeds.registry import Family
from esper.slots.branch import SeedBranch
from esper.slots.committed_seed import CommittedSeed
from esper.slots.config import SlotConfig
from esper.slots.measurements import SeedMeasurements


class SeedRecipe(Record):
    """How a seed was built."""

    blueprint: str
    options: dict[str, Any]
    blend_operator: BlendOperator
    param_count: int

    @classmethod
    def of(cls, seed: SeedBranch | CommittedSeed) -> Self:
        """Return how a seed that lives, or one that was committed, was built."""
        return cls(
            blueprint=seed.blueprint,
            options=seed.options,
            blend_operator=seed.blend_operator,
            param_count=seed.param_count,
        )


class LifeSnapshot(Record):
    """Where a seed's life stood."""

    number: int
    stage: SeedStage
    blueprint: str | None
    alpha: AlphaState
    measurements: SeedMeasurements
    fading_because: str | None
    epochs_in_stage: int
    steps_in_stage: int
    refusals_in_stage: int


class SlotSnapshot(Record):
    """A slot as it was."""

    family: Family
    dim: int
    config: SlotConfig
    committed: tuple[CommittedSeed, ...]
    living: SeedRecipe | None
    life: LifeSnapshot

    def check_fits(self, path: str, *, family: Family, dim: int, config: SlotConfig) -> None:
        """Raise unless a slot is what the one was that this is of.

        Raises:
            ValueError: Its family, width or settings are others.
        """
        for name, value in {"family": family, "dim": dim, "config": config}.items():
            for differs, had, has in _differences(name, getattr(self, name), value):
                raise ValueError(
                    f"slot {path!r} had {differs} {had!r}, and has {has!r}; build the host and "
                    "attach as it was done then"
                )

    @property
    def recipes(self) -> list[SeedRecipe]:
        """How each of its branches was built, in their order: committed, then living."""
        committed = [SeedRecipe.of(seed) for seed in self.committed]
        return committed if self.living is None else [*committed, self.living]


def _differences(name: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between two values, of records each field that does: name, then, now."""
    if isinstance(then, Record):
        for field in type(then).model_fields:
            yield from _differences(f"{name}.{field}", getattr(then, field), getattr(now, field))
    elif then != now:
        yield name, then, now
