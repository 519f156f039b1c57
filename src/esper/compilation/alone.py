"""A slot without a host, for what is compiled before there is one."""

from typing import Any

import torch
from torch import Tensor, nn

from esper.compilation.feature_guards import FeatureGuards
from esper.lifecycle.alpha import BlendOperator
from esper.seeds.registry import Family
from esper.slots.attach import attach
from esper.slots.config import SlotConfig
from esper.slots.slot import SeedSlot

_PLACE = "place"


class _Host(nn.Module):
    """Hands its input on, through the place of a slot in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        placed: Tensor = self.place(features)
        return placed.clone()  # features that a host hands out may be overwritten by others


def seed_alone(
    blueprint: str,
    features: FeatureGuards,
    *,
    family: Family | str | None = None,
    config: SlotConfig | None = None,
    blend_operator: BlendOperator | str | None = None,
    **options: Any,
) -> SeedSlot:
    """Return a slot as it is when a seed has just germinated in it, behind no host.

    Args:
        blueprint: A name in the registry.
        features: What the slot stands behind; the first dimension is the batch.
        family: As for `attach`.
        config: The same.
        blend_operator: As for `SeedSlot.germinate`.
        options: The same.

    Raises:
        BlueprintError: Unknown blueprint or option.
        ValueError: The features have a layout that slots do not take, or the blueprint refuses an
            option's value or the width.
    """
    with torch.random.fork_rng(devices=()):
        example = features.random().detach()
    slots = attach(_Host(), [_PLACE], example=example, config=config, family=family)
    return slots[_PLACE].foreseen(blueprint, blend_operator=blend_operator, **options)
