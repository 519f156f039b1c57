"""What a linear map of the features could do in a seed's place.

Legend: N rows (samples, times pixels or tokens), D features, h features, u increment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_PER_COEFFICIENT = 4
"""Below this the full map would fit the rows rather than the seed."""
_RIDGE = 1e-6
"""Relative to features scaled to a mean square of 1."""


@dataclass(frozen=True)
class LinearImitation:
    """The affine map of the features that comes nearest to an increment.

    Attributes:
        weight: Shape `D D`, float32; applied from the right.
        bias: Shape `D`, float32.
        feature_dim: Where the features are: 1 for maps, -1 for tokens.
        share: Of the increment's sum of squares, what the map explains, in [0, 1]; 1 for an
            increment of zeros.
    """

    weight: Tensor
    bias: Tensor
    feature_dim: int
    share: float

    def __call__(self, features: Tensor) -> Tensor:
        """Return the map's increment: shape and dtype of `features`."""
        rows = features.movedim(self.feature_dim, -1)
        imitated = rows.float() @ self.weight + self.bias
        return imitated.to(features.dtype).movedim(-1, self.feature_dim)


class ImitationFit:
    """Collects what least squares needs while a seed runs.

    Sums are in float64, which autocast leaves alone: features of a rank far below D make them as
    good as singular. Only sums are kept, about (D + 1) (2 D + 1) numbers, however many rows there
    are.

    Args:
        dim: D.
        feature_dim: 1 for maps `B C H W`, -1 for features in the last dimension.
        device: Of the features.
    """

    def __init__(self, dim: int, *, feature_dim: int, device: torch.device) -> None:
        self._feature_dim = feature_dim
        self._gram = torch.zeros(dim + 1, dim + 1, device=device, dtype=torch.float64)
        self._cross = torch.zeros(dim + 1, dim, device=device, dtype=torch.float64)
        self._squares = torch.zeros((), device=device, dtype=torch.float64)

    def __call__(self, features: Tensor, increment: Tensor) -> Tensor:
        """Add what a forward computed, h and u of the same shape, and return u."""
        rows = self._rows(features)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        self._gram += rows.T @ rows
        wanted = self._rows(increment)
        self._cross += rows.T @ wanted
        self._squares += wanted.square().sum()
        return increment

    def solve(self) -> LinearImitation | None:
        """Return the map with the least squared error over all rows so far. Waits for the device.

        With fewer than four rows per coefficient of one output, (D + 1), each output is fitted from
        its own feature alone, a gain and a shift. None if a value was not finite.
        """
        gram, cross = self._gram.cpu(), self._cross.cpu()
        if not (gram.isfinite().all() and cross.isfinite().all()):
            return None
        squares = float(self._squares)
        num_rows, num_coefficients = float(gram[-1, -1]), len(gram)
        if num_rows >= _ROWS_PER_COEFFICIENT * num_coefficients:
            solution = _least_squares(gram, cross)
            weight, bias = solution[:-1], solution[-1]
        else:
            weight, bias = _gain_and_shift(gram, cross)
        coefficients = torch.cat([weight, bias[None]])
        left_over = squares - float((coefficients * (2.0 * cross - gram @ coefficients)).sum())
        share = 1.0 - min(max(left_over / squares, 0.0), 1.0) if squares > 0.0 else 1.0
        device = self._gram.device
        return LinearImitation(
            weight.float().to(device), bias.float().to(device), self._feature_dim, share
        )

    def _rows(self, features: Tensor) -> Tensor:
        return features.detach().movedim(self._feature_dim, -1).flatten(0, -2).double()


def _least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """Return the coefficients; the ridge keeps directions without variance at none."""
    scale = gram.diagonal().sqrt()
    scale = scale.where(scale > 0, torch.ones_like(scale))
    scaled = gram / torch.outer(scale, scale) + _RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.cholesky_solve(cross / scale[:, None], torch.linalg.cholesky(scaled))
    return solution / scale[:, None]


def _gain_and_shift(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    gains, shifts = [], []
    for feature in range(cross.shape[1]):
        both = torch.tensor([feature, len(gram) - 1])
        gain, shift = _least_squares(gram[both][:, both], cross[both, feature : feature + 1])
        gains.append(gain)
        shifts.append(shift)
    return torch.diag(torch.cat(gains)), torch.cat(shifts)
