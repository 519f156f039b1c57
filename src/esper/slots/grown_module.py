"""A host's module with committed seeds behind it, as `bake` makes it."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from esper.slots.branch import SeedBranch
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments, refuse_cached_tokens
from esper.slots.nested import replace_first


class GrownModule(nn.Module):
    """A host's module followed by the seeds that were committed behind it.

    Attributes of the module can be read through it, as hosts do that ask their layers.

    Args:
        module: The host's own.
        branches: Committed seeds in the order of their commits.
    """

    def __init__(self, module: nn.Module, branches: Sequence[SeedBranch]) -> None:
        super().__init__()
        self.module = module
        self.branches = nn.ModuleList(branches)
        self.contextual = any(branch.contextual for branch in branches)
        self.mixes_tokens = any(branch.mixes_tokens for branch in branches)
        self.first_parameter = first_parameter(module)
        self.training = self.branches.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the seeds applied to its features."""
        output = self.module(*args, **kwargs)
        features = output if isinstance(output, Tensor) else output[0]
        if self.mixes_tokens:
            refuse_cached_tokens(features, args, kwargs)
        call = NO_ARGUMENTS
        if self.contextual:
            call = CallArguments.of_call(args, kwargs, self.first_parameter)
        for branch in self.branches:
            features = features + branch(features, features, call)
        return replace_first(output, features)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not there yet; or of Python's own, as __deepcopy__, which would copy the module alone.
            if name == "module" or name.startswith("__"):
                raise
        value = getattr(self.module, name)
        if isinstance(value, Tensor):
            # Whoever computes with the weights itself would leave out the seeds.
            raise AttributeError(  # noqa: TRY004 – what hasattr() expects
                f"{name!r} is a tensor of the module inside this GrownModule; call the "
                f"GrownModule, or read .module.{name}"
            )
        return value


def first_parameter(module: nn.Module) -> str | None:
    """Return the name of the first parameter of a module's forward, which takes the features.

    A GrownModule takes what the module in it takes.
    """
    while isinstance(module, GrownModule):
        module = module.module
    return next(iter(inspect.signature(module.forward).parameters), None)
