"""The best linear map in a seed's place: exact where the seed is one, and no more than that.

Legend: N rows, B batch, C channels, H height, W width, T tokens, D features.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.stages import SeedStage
from esper.slots import Imitated, fitting_imitations, fused_losses, weigh
from esper.slots.linear_imitation import ImitationFit, LinearImitation
from planted_seeds import planted

D = 5


def fit_of(features: Tensor, increment: Tensor, feature_dim: int = -1) -> ImitationFit:
    fit = ImitationFit(D, feature_dim=feature_dim, device=features.device)
    for rows, wanted in zip(features.split(7), increment.split(7), strict=True):
        assert fit(rows, wanted) is wanted
    return fit


def solved(fit: ImitationFit) -> LinearImitation:
    imitation = fit.solve()
    assert imitation is not None
    return imitation


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with planted():
        yield


@pytest.mark.parametrize("shape", [(40, D), (9, 6, D)], ids=["features", "tokens"])
def test_an_affine_map_of_features_is_imitated_exactly(shape: tuple[int, ...]) -> None:
    features, mix, shift = torch.randn(shape) + 2.0, torch.randn(D, D), torch.randn(D)
    imitation = solved(fit_of(features, features @ mix + shift))
    fresh = torch.randn(3, *shape[1:])
    torch.testing.assert_close(imitation(fresh), fresh @ mix + shift, rtol=1e-3, atol=1e-3)


def test_an_affine_map_of_channels_is_imitated_exactly_on_maps() -> None:
    maps, mix, shift = torch.randn(9, D, 3, 4), torch.randn(D, D), torch.randn(D)

    def affine(of: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", of, mix) + shift[:, None, None]

    imitation = solved(fit_of(maps, affine(maps), feature_dim=1))
    fresh = torch.randn(2, D, 3, 4)
    torch.testing.assert_close(imitation(fresh), affine(fresh), rtol=1e-3, atol=1e-3)


def test_what_is_not_linear_is_left_over() -> None:
    features = torch.randn(400, D)
    increment = features.square() - 1.0 + 0.5 * features
    imitated = solved(fit_of(features, increment))(features)
    linear_part = 0.5 * features
    assert mse_loss(imitated, linear_part) < 0.05 * mse_loss(increment, linear_part)
    least = torch.linalg.lstsq(torch.cat([features, torch.ones(400, 1)], 1), increment)
    best = torch.cat([features, torch.ones(400, 1)], 1) @ least.solution
    torch.testing.assert_close(imitated, best, rtol=1e-3, atol=1e-3)


def test_the_share_is_what_the_map_explains_of_the_sum_of_squares() -> None:
    features = torch.randn(400, D)
    linear = features @ torch.randn(D, D) + torch.randn(D)
    assert solved(fit_of(features, linear)).share == pytest.approx(1.0, abs=1e-4)
    assert solved(fit_of(features, torch.zeros(400, D))).share == 1.0
    mixed = linear + 2.0 * torch.randn(400, D)
    imitation = solved(fit_of(features, mixed))
    expected = 1.0 - (mixed - imitation(features)).square().sum() / mixed.square().sum()
    assert imitation.share == pytest.approx(float(expected), abs=1e-3)
    assert 0.1 < imitation.share < 0.9


def test_with_few_rows_each_feature_has_a_gain_and_a_shift_and_no_more() -> None:
    features, gain, shift = torch.randn(4 * (D + 1) - 1, D), torch.randn(D), torch.randn(D)
    imitation = solved(fit_of(features, features * gain + shift))
    fresh = torch.randn(3, D)
    torch.testing.assert_close(imitation(fresh), fresh * gain + shift, rtol=1e-3, atol=1e-3)
    mixed = solved(fit_of(features, features @ torch.randn(D, D)))
    assert torch.equal(mixed.weight, torch.diag(mixed.weight.diagonal()))


def test_features_that_do_not_vary_do_no_harm() -> None:
    features = torch.randn(100, D)
    features[:, 1] = 0.0
    features[:, 2] = 3.0
    features[:, 4] = features[:, 3]
    increment = features @ torch.randn(D, D) + 1.0
    imitated = solved(fit_of(features, increment))(features)
    torch.testing.assert_close(imitated, increment, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_features_of_low_rank_are_fitted_under_autocast_too(*, autocast: bool) -> None:
    """As behind a layer that widens them; the sums of their products are nearly singular."""
    width, rank = 96, 12
    features = torch.relu(torch.randn(4000, rank) + 1.0) @ torch.randn(rank, width)
    increment = features @ torch.randn(width, width) / width
    fit = ImitationFit(width, feature_dim=-1, device=features.device)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for rows, wanted in zip(features.split(500), increment.split(500), strict=True):
            fit(rows, wanted)
    imitation = solved(fit)
    assert imitation.share == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(imitation(features), increment, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_imitates_what_is_not_finite(value: float) -> None:
    features, increment = torch.randn(50, D), torch.randn(50, D)
    increment[3, 2] = value
    assert fit_of(features, increment).solve() is None
    assert fit_of(increment, features).solve() is None


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, D), nn.Linear(D, D)
        self.head = nn.Linear(D, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(features))))).squeeze(1)


def sample_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square()


@pytest.fixture
def grown(randomise: Any) -> tuple[nn.Module, esper.SlotSet]:
    """A host with an MLP in its first slot and a gain and shift in its second, both in use."""
    model = Host()
    slots = esper.attach(model, ["first", "second"], example=torch.randn(2, 3))
    for slot, blueprint in zip(slots.values(), ("mlp", "gain_and_shift"), strict=True):
        slot.germinate(blueprint)
        while slot.stage is not SeedStage.SHADOWING:
            slot.advance(force=True)
        randomise(slot.living)
    return model.eval(), slots


def test_imitations_run_beside_seeds_in_one_forward(
    grown: tuple[nn.Module, esper.SlotSet],
) -> None:
    model, slots = grown
    inputs, targets = torch.randn(60, 3), torch.randn(60)
    with fitting_imitations(slots) as fits:
        fused_losses(model, slots, inputs, targets, sample_losses, [{"first": 1.0, "second": 1.0}])
    by = {path: solved(fit) for path, fit in fits.items()}
    variants = [
        {"first": 1.0, "second": 1.0},
        {"first": Imitated(0.5, by["first"]), "second": 1.0},
        {"first": 1.0, "second": Imitated(1.0, by["second"])},
        {"first": 0.0},
    ]
    together = fused_losses(model, slots, inputs, targets, sample_losses, variants)
    for variant, losses in zip(variants, together, strict=True):
        alone = fused_losses(model, slots, inputs, targets, sample_losses, [variant])[0]
        torch.testing.assert_close(losses, alone)
    # The gain and shift is imitated exactly, the perceptron is not.
    torch.testing.assert_close(together[2], together[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[1], together[0], rtol=1e-2)
    with weigh(slots["first"], Imitated(0.5, by["first"])), torch.no_grad():
        torch.testing.assert_close(sample_losses(model(inputs), targets), together[1])
    assert all(slot.measured_as is None and slot.forced_alpha is None for slot in slots.values())


def test_imitations_of_different_fits_in_one_forward_are_refused(
    grown: tuple[nn.Module, esper.SlotSet],
) -> None:
    model, slots = grown
    one, other = (LinearImitation(torch.eye(D), torch.zeros(D), -1, 1.0) for _ in range(2))
    variants = [{"first": Imitated(1.0, one)}, {"first": Imitated(1.0, other)}]
    with pytest.raises(ValueError, match="variants of one forward must share an imitation"):
        fused_losses(model, slots, torch.randn(4, 3), torch.zeros(4), sample_losses, variants)
    assert slots["first"].measured_as is None


def test_what_is_measured_is_the_seed_again_when_the_block_raises(
    grown: tuple[nn.Module, esper.SlotSet],
) -> None:
    _, slots = grown
    with pytest.raises(RuntimeError, match="stop"), slots["first"].measure_as(lambda _, u: 2 * u):
        raise RuntimeError("stop")
    assert slots["first"].measured_as is None
