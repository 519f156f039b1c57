"""A host's module whose forward is compiled while it trains."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from esper.compilation.compiled_functions import CompiledFunctions
from esper.compilation.structures import InnerHooks, structure_of_module
from esper.slots.forwards import StandIn, has_forward
from esper.slots.placement import slot_behind


class LateHookError(RuntimeError):
    """A module inside of a compiled one has other hooks than when that was compiled."""


_OTHER_HOOKS = (
    "modules in it have other hooks than in its first step, which its graphs would leave out; "
    "register hooks before that step, or release this CompiledHost and make another one"
)


class CompiledRegion(StandIn):
    """Stands in for a module's forward; its own hooks stay outside of it, a slot's among them.

    Hooks of the modules in it are compiled with it, as they are in its first step. While they are
    others, the module runs as it is. So it does in eval mode and without gradients, so that
    measuring, on batches of any size, compiles nothing, and for good once the compiler has failed
    on it.

    Args:
        path: Of the module, for people.
        module: Whose forward is replaced until `release`.
        functions: Of `run_module`. Modules of equal structure and hooks share one, unless those
            that do have more graphs than the compiler keeps, as they differ by a number that they
            compute with.
        failed: Is told the path and why the module runs as it is.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        functions: CompiledFunctions,
        *,
        failed: Callable[[str, Exception], None],
    ) -> None:
        super().__init__(module)
        self.path = path
        self._functions = functions
        self._failed = failed
        self._compiled: Callable[..., Any] | None = None
        """None before the first step."""
        self._met: set[Hashable] = set()
        """Kinds of calls that ran compiled, which compile nothing any more."""
        self._alone = self._refused = False
        self._inner_hooks = InnerHooks(module)
        self._compiled_with = self._inner_hooks.now()
        self._late_hooks_told = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        if module.training and torch.is_grad_enabled() and not self._refused:
            compiled = self._function()
            if compiled is not None:
                try:
                    return self._run(compiled, args, kwargs)
                except Exception as error:
                    if _is_limit_of_graphs(error) and not self._alone:
                        self._alone = True
                        self._compiled = self._functions.of(("alone", self.path))
                        self._met.clear()
                        return self(*args, **kwargs)
                    if not _is_of_the_compiler(error):
                        raise
                    self._refused = True
                    self._failed(self.path, error)
        return type(module).forward(module, *args, **kwargs)

    def _run(
        self, compiled: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        kind = tuple(
            (value.shape, value.dtype, value.requires_grad)
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor)
        )
        if kind in self._met:
            result, _ = compiled(self._module, *args, **kwargs)
            return result
        # An error of the backward's compiling would end the step if it came in loss.backward().
        with _backward_compiled_in_forward():
            result, has_run_compiled = compiled(self._module, *args, **kwargs)
        if has_run_compiled:  # torch's stance may be to run everything as it is
            self._met.add(kind)
        return result

    def _function(self) -> Callable[..., Any] | None:
        """Return what to run compiled; None while that would leave out hooks."""
        hooks = self._inner_hooks.now()
        if self._compiled is None:
            self._compiled_with = hooks
            self._compiled = self._functions.of((structure_of_module(self._module), hooks))
        elif hooks != self._compiled_with:
            if not self._late_hooks_told:
                self._late_hooks_told = True
                self._failed(self.path, LateHookError(_OTHER_HOOKS))
            return None
        return self._compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Let a copy of the module run as it is."""
        return own_forward(memo[id(self._module)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pickled module run as it is."""
        return own_forward, (self._module,)


def own_forward(module: nn.Module) -> MethodType:
    """Return the forward that a module has by its class."""
    return MethodType(type(module).forward, module)


def _backward_compiled_in_forward() -> AbstractContextManager[Any]:
    from torch._functorch import config  # noqa: PLC0415 – importing it takes seconds

    if not hasattr(config, "force_non_lazy_backward_lowering"):  # an older torch
        return nullcontext()
    patched: AbstractContextManager[Any] = config.patch(force_non_lazy_backward_lowering=True)
    return patched


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 – importing it takes seconds

    return isinstance(error, TorchDynamoException) or _is_limit_of_graphs(error)


def _is_limit_of_graphs(error: Exception) -> bool:
    """Return whether code has as many graphs as the compiler keeps, and needs another one."""
    # Its class is none of TorchDynamoException, and has had another name in torch 2.6.
    return type(error).__name__ in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")


def run_module(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    """Run a module's own forward, which is what regions compile; return whether compiled, too."""
    return type(module).forward(module, *args, **kwargs), torch.compiler.is_compiling()


def regions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest modules, with modules in them, that can be run and have no slot inside.

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
    if path and has_forward(module) and all(slot_behind(part) is None for part in inside):
        yield path, module
        return
    for name, part in parts:
        yield from _regions(part, f"{path}.{name}" if path else name)
