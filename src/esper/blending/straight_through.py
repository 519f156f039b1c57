"""How a seed learns behind the host: forward the host alone, backward to both.

Legend: h host features, u the operator's increment, g the loss gradient at the output.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # torch asks itself by no other name

from esper.blending.objectives import SEED_GRADIENTS
from esper.lifecycle.learning import SeedObjective

DEFAULT_TRUST_FRACTION = 0.1
"""c: the size of u, relative to h, that an objective settles at or keeps below."""


class _StraightThrough(torch.autograd.Function):
    """To both in the backward; how its forward is told of differs by who asks."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        twice = torch.is_grad_enabled()  # then the seed must not be in the host's next derivative
        seen = gradient.detach() if twice else gradient
        if ctx.objective is SeedObjective.PLAIN:
            return gradient, seen, None, None, None
        features, increment = ctx.saved_tensors
        met = features.detach() if twice else features
        to_seed = SEED_GRADIENTS[ctx.objective](seen, increment, met, ctx.trust_fraction)
        return gradient, to_seed, None, None, None


class _Compilable(_StraightThrough):
    """For the compiler, which takes no `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        _increment: Tensor,
        _objective: SeedObjective,
        _trust_fraction: float,
        overwritten: bool,
    ) -> Tensor:
        return _passed(features, overwritten=overwritten)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        _keep(ctx, *inputs)


class _Transformable(_Compilable):
    """For `torch.func`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _passed(tangents[0], overwritten=ctx.overwritten)


class _Eager(_StraightThrough):
    """For a step: with a `setup_context` torch would look at a signature each time, for 0.1 ms."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        increment: Tensor,
        objective: SeedObjective,
        trust_fraction: float,
        overwritten: bool,
    ) -> Tensor:
        _keep(ctx, features, increment, objective, trust_fraction, overwritten)
        return _passed(features, overwritten=overwritten)

    jvp = _Transformable.jvp


def _passed(features: Tensor, *, overwritten: bool) -> Tensor:
    return features.clone() if overwritten else features.view_as(features)


def _keep(
    ctx: Any,
    features: Tensor,
    increment: Tensor,
    objective: SeedObjective,
    trust_fraction: float,
    overwritten: bool,
) -> None:
    ctx.objective, ctx.trust_fraction, ctx.overwritten = objective, trust_fraction, overwritten
    if objective is not SeedObjective.PLAIN:
        ctx.save_for_backward(features, increment)


def straight_through(
    features: Tensor,
    increment: Tensor,
    *,
    objective: SeedObjective = SeedObjective.PROXIMAL,
    trust_fraction: float = DEFAULT_TRUST_FRACTION,
    overwritten: bool = False,
) -> Tensor:
    """Return the host features themselves, and give the increment a gradient too.

    The host's gradient is the incoming one, bit for bit, and its second derivatives are those
    without the seed; an inf or NaN in the increment reaches none of them, nor the output. Runs
    under `torch.func` too.

    Args:
        features: h, any shape.
        increment: u, same shape and dtype as `features`.
        objective: What the increment's gradient is made of; SHADOW does not learn this way.
        trust_fraction: c of the objective; PLAIN passes the gradient on as it is.
        overwritten: The caller changes the output in place, which the seed's own backward must not
            see: the output is a copy.
    """
    assert objective is not SeedObjective.SHADOW
    function: type[_StraightThrough]
    if torch.compiler.is_compiling():
        function = _Compilable
    else:
        function = _Transformable if _are_functorch_transforms_active() else _Eager
    output: Tensor = function.apply(  # type: ignore[no-untyped-call]
        features, increment, objective, trust_fraction, overwritten
    )
    return output
