"""The digits task: real data, always the same."""

import pytest
import torch

from esper.tasks import TASKS, named_task
from esper.tasks.digits.data import load_splits, shifted


def test_splits_are_disjoint_and_complete() -> None:
    images = [split.images for split in load_splits()]
    assert [len(part) for part in images] == [1000, 397, 400]
    assert all(part.shape[1:] == (1, 8, 8) for part in images)
    together = torch.cat(images)
    assert 0.0 <= together.min() < together.max() <= 1.0
    assert len({row.numpy().tobytes() for row in together}) == len(together)


def test_shift_moves_by_at_most_one_pixel_and_keeps_what_stays_inside() -> None:
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 4] = 1.0
    moved = shifted(image, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(200))


@pytest.mark.parametrize("name", list(TASKS))
def test_same_seed_gives_same_host_and_data_order(name: str) -> None:
    state = torch.get_rng_state()
    first, second, other = (named_task(name).build(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)

    def weights(setup: object) -> list[torch.Tensor]:
        return list(setup.model.parameters())  # type: ignore[attr-defined]

    assert all(map(torch.equal, weights(first), weights(second)))
    assert not all(map(torch.equal, weights(first), weights(other)))
    for mine, same in zip(first.batches, second.batches, strict=True):
        assert torch.equal(mine[0], same[0])
        assert torch.equal(mine[1], same[1])
    assert not torch.equal(next(iter(first.batches))[0], next(iter(other.batches))[0])


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        named_task("digit")
