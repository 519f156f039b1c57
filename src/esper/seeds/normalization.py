"""Normalisation that works for every width: GroupNorm with a count that divides it."""

from typing import Any

import torch
from torch import Tensor, nn


def group_count(channels: int, *, at_most: int = 8) -> int:
    """Return the largest divisor of `channels` up to `at_most` with two channels or more a group.

    A group of one channel would normalise each channel by itself: no bias in front of it could
    learn, and a map of one pixel would become a constant. One channel makes one group.

    Raises:
        ValueError: Either number is below 1.
    """
    if channels < 1 or at_most < 1:
        raise ValueError(
            f"channels and at_most must be at least 1, got channels={channels}, at_most={at_most}"
        )
    largest = max(1, min(channels // 2, at_most))
    return next(count for count in range(largest, 0, -1) if channels % count == 0)


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, safe on the detached features that isolated seeds read.

    On a CPU the backward of torch 2.13's own ends the process with a segmentation fault if the
    input is in channels-last layout and needs no gradient; such an input is made contiguous.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 – as torch's, which may be called by name
        """Return the normalised features, same shape."""
        return super().forward(_safe_to_normalise(input))


def make_group_norms_safe(module: nn.Module) -> None:
    """Let every GroupNorm in a module that somebody else wrote be as safe as the one here.

    Effects: torch's own become what is here, in place; those with a forward of their own, as a
    subclass, get a forward pre-hook.
    """
    for norm in module.modules():
        if not isinstance(norm, nn.GroupNorm) or isinstance(norm, GroupNorm):
            continue
        if type(norm) is nn.GroupNorm and "forward" not in vars(norm):
            norm.__class__ = GroupNorm
        elif _before_group_norm not in norm._forward_pre_hooks.values():  # noqa: SLF001 – torch has no public list
            norm.register_forward_pre_hook(_before_group_norm, with_kwargs=True)


def _before_group_norm(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    safe_kwargs = {name: _safe_to_normalise(value) for name, value in kwargs.items()}
    return tuple(map(_safe_to_normalise, args)), safe_kwargs


def _safe_to_normalise(features: Any) -> Any:
    if not isinstance(features, Tensor):
        return features  # of further arguments, which a GroupNorm of a library's own may have
    on_cpu = features.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and not features.requires_grad:
        return features.contiguous()
    return features


def group_norm(channels: int, *, at_most: int = 8) -> GroupNorm:
    """Return a GroupNorm over `group_count(channels)` groups.

    Seeds never use BatchNorm: its running statistics would be shared state between a seed that
    trains on detached features and one that is live.
    """
    return GroupNorm(group_count(channels, at_most=at_most), channels)
