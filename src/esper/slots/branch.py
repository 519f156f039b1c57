"""A seed with its operator: the residual branch that a slot adds to the host's features."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from esper.blending.operators import SampleGate, operator_increment
from esper.lifecycle.alpha import BlendOperator
from esper.seeds.identity import scale_output_
from esper.seeds.registry import Family
from esper.seeds.seed import ContextualSeed, Seed
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments


class SeedBranch(nn.Module):
    """Computes the operator's increment `u` from the host's features and the seed.

    The gate of the GATE operator is part of the branch: in the state dict, in the optimizer, and
    gone with the seed.

    Args:
        seed: Computes the increment.
        blueprint: That built it.
        options: That it was built with.
        blend_operator: What makes `u` of its increment.
        family: How the features are laid out.
        dim: Their width.
        casts: The seed and its gate read the features and the call's arguments in the dtype of
            their own parameters. For hosts that autocast inside a module, and go on with its
            half-precision features outside.

    Attributes:
        rescaled: Product of the factors that `rescale` was given, for what follows the weights.
    """

    def __init__(
        self,
        seed: Seed,
        *,
        blueprint: str,
        options: Mapping[str, Any],
        blend_operator: BlendOperator,
        family: Family,
        dim: int,
        casts: bool = False,
    ) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.options = dict(options)
        self.blend_operator = blend_operator
        self.casts = casts
        self.rescaled = 1.0
        self.seed = seed
        self.gate = (
            SampleGate(dim, channels_first=family is Family.CNN)
            if blend_operator is BlendOperator.GATE
            else None
        )

    @property
    def contextual(self) -> bool:
        """Whether the seed reads the call's further arguments."""
        return isinstance(self.seed, ContextualSeed)

    @property
    def mixes_tokens(self) -> bool:
        """Whether a token's increment depends on other tokens."""
        return self.seed.mixes_tokens

    @property
    def param_count(self) -> int:
        """Parameters of the seed and its gate."""
        return sum(parameter.numel() for parameter in self.parameters())

    def rescale(self, factor: float) -> None:
        """Multiply the seed's output layers by a factor, in place."""
        for layer in self.seed.output_layers:
            scale_output_(layer, factor)
        self.rescaled *= factor

    def forward(
        self,
        features: Tensor,
        seed_input: Tensor,
        call: CallArguments = NO_ARGUMENTS,
        *,
        severed: bool = False,
    ) -> Tensor:
        """Return `u`, shape and dtype of `features`.

        Args:
            features: h, what the increment is added to.
            seed_input: What the seed reads: `features`, or the same detached while isolated.
            call: What the module in front was called with, for a seed that reads it.
            severed: Cut what the seed and its gate computed off the graph; the operator's own use
                of `features` stays in it.
        """
        if self.casts:
            dtype = next((p.dtype for p in self.parameters()), seed_input.dtype)
            seed_input, call = seed_input.to(dtype), call.to(seed_input.device, dtype)
        gate = None if self.gate is None else self.gate(seed_input)
        seed = self.seed
        if isinstance(seed, ContextualSeed):
            increment = seed.increment(seed_input, *call.args, **call.kwargs)
        else:
            increment = seed.increment(seed_input)
        if severed:
            increment = increment.detach()
            gate = None if gate is None else gate.detach()
        return operator_increment(self.blend_operator, features, increment, gate)
