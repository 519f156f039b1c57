"""What every seed is: a module that adds an increment to its input."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Seed(nn.Module, ABC):
    """A module `s(x) = x + f(x)` whose increment `f` is exactly zero at birth.

    A blueprint implements `increment` and names its `output_layer`. Slots mix `f` itself, never
    `s(x) - x`: that costs no subtraction, and a committed seed equals the inlined module bitwise.
    """

    @abstractmethod
    def increment(self, features: Tensor) -> Tensor:
        """Return `f(features)`: same shape as `features`, exactly zero in a fresh seed."""

    @property
    @abstractmethod
    def output_layer(self) -> nn.Module | None:
        """The affine layer that `f` is linear in to first order; None for a seed without one.

        The amplitude search scales it.
        """

    def forward(self, features: Tensor) -> Tensor:
        """Return `features + f(features)`."""
        return features + self.increment(features)
