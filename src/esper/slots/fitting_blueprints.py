"""Which blueprints fit a slot, asked of the meta device once and remembered."""

import torch

from esper.lifecycle.actions import BlueprintChoice
from esper.seeds.registry import blueprints
from esper.slots.caches import BoundedCache
from esper.slots.germination import SeedOrder, fits
from esper.slots.slot import SeedSlot


class FittingBlueprints:
    """Answers for the slots of one model; slots that are alike share an answer.

    Attributes:
        cache: Of parameter counts; None for a blueprint that does not fit.
    """

    def __init__(self) -> None:
        self.cache: BoundedCache[int | None] = BoundedCache(max_entries=512, max_age_seconds=3600.0)

    def of(self, slot: SeedSlot) -> tuple[BlueprintChoice, ...]:
        """Return the blueprints that fit a slot when built without options, cheapest first."""
        call = slot.example_call.described()
        fitting = [
            BlueprintChoice(
                name=name, param_count=count, linear=blueprints.get(slot.family, name).linear
            )
            for name in blueprints.names(slot.family)
            if (count := self._param_count_if_fits(slot, name, call)) is not None
        ]
        return tuple(sorted(fitting, key=lambda choice: choice.param_count))

    def _param_count_if_fits(self, slot: SeedSlot, blueprint: str, call: str) -> int | None:
        order = SeedOrder(
            blueprint=blueprint,
            options={},
            blend_operator=slot.config.blend_operator,
            layout=slot.layout,
            device=torch.device("meta"),
            dtype=slot.blend_alpha.dtype,
            call=slot.example_call,
            samples=slot.example_samples,
        )
        key = (
            blueprints.version,
            slot.layout,
            call,
            blueprint,
            order.blend_operator,
            order.dtype,
        )
        return self.cache.get_or_make(key, lambda: fits(order))
