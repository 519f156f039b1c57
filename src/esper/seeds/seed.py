"""What every seed is: a module that adds an increment to its input."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Seed(nn.Module, ABC):
    """A module `s(x) = x + f(x)` whose increment `f` is exactly zero at birth.

    A blueprint implements `increment` and names its `output_layers`. Slots mix `f` itself, never
    `s(x) - x`: that costs no subtraction, and a committed seed equals the inlined module bitwise.
    """

    mixes_tokens: bool = False
    """Whether a token's increment depends on other tokens. Such a seed keeps no key-value cache:
    slots refuse to run it on tokens whose predecessors are in one."""

    @abstractmethod
    def increment(self, features: Tensor) -> Tensor:
        """Return `f(features)`: same shape as `features`, exactly zero in a fresh seed."""

    @property
    @abstractmethod
    def output_layers(self) -> tuple[nn.Module, ...]:
        """The affine layers, zero at birth, that `f` is linear in to first order.

        The amplitude search scales them. Empty for a seed that cannot learn.
        """

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """The parts that are copies of the module given as `source`, whole, under its names."""
        return ()

    def linear_map(self) -> Tensor | None:
        """Return M, shape `D D`, if `f(x) = M x` over the features; None for any other seed.

        `esper.bake(model, fold=True)` multiplies it into the weight in front.
        """
        return None

    def prepare(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Build what an increment on features of this shape looks up but must not build itself.

        Called outside compiled graphs; most seeds need nothing.
        """

    def forward(self, features: Tensor) -> Tensor:
        """Return `features + f(features)`."""
        return features + self.increment(features)


class ContextualSeed(Seed, ABC):
    """A seed that reads what the host gave to the module in front of it, masks say.

    Its slot passes on that call's arguments after the first, key-value caches left out.
    """

    @abstractmethod
    def increment(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `f(features)`: same shape as `features`, exactly zero in a fresh seed."""
