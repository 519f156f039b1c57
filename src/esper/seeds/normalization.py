"""Normalisation that works for every width: GroupNorm with a count that divides it."""

from torch import nn


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


def group_norm(channels: int, *, at_most: int = 8) -> nn.GroupNorm:
    """Return a GroupNorm over `group_count(channels)` groups.

    Seeds never use BatchNorm: its running statistics would be shared state between a seed that
    trains on detached features and one that is live.
    """
    return nn.GroupNorm(group_count(channels, at_most=at_most), channels)
