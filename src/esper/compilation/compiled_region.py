"""A host's module whose forward is compiled while it trains."""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from esper.slots.placement import slot_behind


class CompiledRegion:
    """Stands in for a module's forward; hooks stay outside of it, a slot's among them.

    In eval mode and without gradients the module runs as it is, so that measuring, on batches of
    any size, compiles nothing. So it does for good once the compiler has failed on it.

    Args:
        path: Of the module, for people.
        module: Whose forward is replaced until `release`.
        compiled: Takes the module and the arguments of its forward; equal modules share it.
        alone: Makes such a function that no other module shares, for where those that do have more
            graphs than the compiler keeps, as they differ by a number that they compute with.
        failed: Is told the path and why the compiler failed.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        compiled: Callable[..., Any],
        *,
        alone: Callable[[], Callable[..., Any]],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self.path = path
        self._module = module
        self._compiled: Callable[..., Any] | None = compiled
        self._alone: Callable[[], Callable[..., Any]] | None = alone
        self._failed = failed
        module.forward = self

    def release(self) -> None:
        """Give the module its own forward back."""
        if self._module.__dict__.get("forward") is self:
            del self._module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, compiled = self._module, self._compiled
        if compiled is not None and module.training and torch.is_grad_enabled():
            try:
                return compiled(module, *args, **kwargs)
            except Exception as error:
                if _is_limit_of_graphs(error) and self._alone is not None:
                    self._compiled, self._alone = self._alone(), None
                    return self(*args, **kwargs)
                if not _is_of_the_compiler(error):
                    raise
                self._compiled = None
                self._failed(self.path, error)
        return type(module).forward(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Let a copy of the module run as it is."""
        return own_forward(memo[id(self._module)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pickled module run as it is."""
        return own_forward, (self._module,)


def own_forward(module: nn.Module) -> MethodType:
    """Return the forward that a module has by its class."""
    return MethodType(type(module).forward, module)


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 – importing it takes seconds

    return isinstance(error, TorchDynamoException) or _is_limit_of_graphs(error)


def _is_limit_of_graphs(error: Exception) -> bool:
    """Return whether code has as many graphs as the compiler keeps, and needs another one."""
    # Its class is none of TorchDynamoException, and has had another name in torch 2.6.
    return type(error).__name__ in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")


def run_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module's own forward; what regions compile."""
    return type(module).forward(module, *args, **kwargs)


def regions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest modules, with modules in them, that have no slot inside.

    A slot behind a module is not inside it. A module without others in it gains nothing by being
    compiled alone, and is left out.
    """
    yield from _regions(model, "")


def _regions(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    own = slot_behind(module)
    parts = [(name, part) for name, part in module.named_children() if part is not own]
    if not parts or "forward" in module.__dict__:
        return
    inside = [part for _, child in parts for part in child.modules()]
    if path and all(slot_behind(part) is None for part in inside):
        yield path, module
        return
    for name, part in parts:
        yield from _regions(part, f"{path}.{name}" if path else name)
