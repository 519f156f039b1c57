"""Options of the blueprints: what they change, and which values are refused."""

import pytest

from esper.seeds import blueprints


@pytest.mark.parametrize(
    ("family", "name", "options", "count"),
    [
        ("cnn", "attention", {"reduction": 2}, 8 * 4 + 4 + 4 * 8 + 8),
        ("cnn", "depthwise", {"kernel_size": 5}, 8 * 25 + 8 + 2 * 8 + 8 * 8 + 8),
        ("cnn", "bottleneck", {"reduction": 2}, 8 * 4 + 4 + 8 + 4 * 4 * 9 + 4 + 8 + 4 * 8 + 8),
        ("cnn", "bottleneck", {"reduction": 99}, 8 * 2 + 2 + 4 + 2 * 2 * 9 + 2 + 4 + 2 * 8 + 8),
        ("cnn", "conv_small", {}, 8 * 4 * 9 + 4 + 8 + 4 * 8 + 8),
        ("cnn", "conv_light", {"kernel_size": 1}, 8 * 8 + 8 + 16 + 8 * 8 + 8),
        ("cnn", "conv_heavy", {}, 2 * (8 * 8 * 9 + 8) + 16),
        ("transformer", "lora", {"rank": 3}, 2 * 8 * 3),
        ("transformer", "mlp", {"expansion": 2}, 16 + 8 * 16 + 16 + 16 * 8 + 8),
    ],
)
def test_an_option_changes_the_seed_as_computed_by_hand(
    family: str, name: str, options: dict[str, int], count: int
):
    assert blueprints.param_count(family, name, 8, **options) == count


@pytest.mark.parametrize(
    ("family", "name", "options", "message"),
    [
        ("cnn", "attention", {"reduction": 0}, "reduction must be at least 1, got 0"),
        ("cnn", "bottleneck", {"reduction": -1}, "reduction must be at least 1, got -1"),
        ("cnn", "bottleneck", {"kernel_size": 2}, "kernel_size must be odd and positive.*got 2"),
        ("cnn", "depthwise", {"kernel_size": 0}, "kernel_size must be odd and positive.*got 0"),
        ("cnn", "conv_small", {"kernel_size": -1}, "kernel_size must be odd and positive.*got -1"),
        ("transformer", "lora", {"rank": 0}, "rank must be at least 1, got 0"),
        ("transformer", "mlp", {"expansion": 0}, "expansion must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_and_not_clamped(
    family: str, name: str, options: dict[str, int], message: str
):
    with pytest.raises(ValueError, match=message):
        blueprints.create(family, name, 8, **options)
