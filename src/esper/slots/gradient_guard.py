"""What keeps a living seed's gradients from harming anyone."""

import itertools
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.slots.sharded import local_part


class GradientGuard:
    """Hooks on a seed's parameters that run as their gradients arrive in `.grad`.

    - `frozen`: the gradient is dropped, so every optimizer skips the parameter: no momentum, no
      weight decay. `requires_grad` stays as it is, and with it the compiled graph.
    - `sanitising`: a gradient with an inf or NaN becomes zero before GradScaler or clipping can
      see it, so that an isolated seed cannot make the host skip a step. Noted on the device.

    Never waits for the device.

    Args:
        module: The living seed's branch.
        broken: Returns the 0-dim bool tensor, on the branch's device, that becomes true where a
            gradient is zeroed; asked each time, since a device move replaces it.
    """

    def __init__(self, module: nn.Module, broken: Callable[[], Tensor]) -> None:
        self.frozen = False
        self.sanitising = True
        self.may_be_broken = not broken().is_cpu
        """Whether `broken` has to be asked: on a CPU it is known, and elsewhere always, since a
        CUDA graph that is replayed calls no hook."""
        self.broken = broken
        self._watch(module)

    def watch(self, module: nn.Module) -> None:
        """Stand on the parameters that the branch has now, which loading may have replaced."""
        if any(a is not b for a, b in itertools.zip_longest(self._met, module.parameters())):
            self.remove()
            self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        self._met = list(module.parameters())
        learning = (parameter for parameter in self._met if parameter.requires_grad)
        hook = _hook_of(weakref.ref(self))
        self._handles = [_on_gradient(parameter, hook) for parameter in learning]

    def remove(self) -> None:
        """Remove the hooks; gradients arrive unguarded from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _hook_of(held: "weakref.ref[GradientGuard]") -> Callable[[Tensor], None]:
    """Return the hook of a guard, which it does not keep.

    Autograd holds hooks where Python's garbage collector does not look. A hook that kept its guard,
    and with it the slot and the parameter it is on, would keep the model for good.
    """

    def _arrived(parameter: Tensor) -> None:
        guard, gradient = held(), parameter.grad
        if guard is None or gradient is None:
            return
        if guard.frozen:
            parameter.grad = None
        elif guard.sanitising and not _is_known_finite(gradient):
            zero_if_broken(gradient, guard.broken)
            guard.may_be_broken = True

    return _arrived


def zero_if_broken(gradient: Tensor, told: Callable[[], Tensor]) -> None:
    """Make a gradient zero, in place, and tell it, if it has an inf or NaN; no synchronisation.

    Args:
        gradient: Dense or sparse; of a sharded one the part in this process is looked at.
        told: Returns the 0-dim bool tensor, on the gradient's device, that becomes true then.
    """
    values = local_part(gradient)
    if values.is_sparse:
        values = values._values()  # noqa: SLF001 – what may be written to, repeated indices too
    if values.numel() == 0:  # no part of it is here
        return
    if values.is_complex():  # numbers without an order
        broken = values.isfinite().all().logical_not()
    else:
        # A NaN is both. Times 0 only a finite number is a number; isfinite takes four kernels.
        lowest, highest = torch.aminmax(values)
        broken = torch.add(lowest * 0.0, highest, alpha=0.0).isnan()
    values.masked_fill_(broken, 0.0)
    told().logical_or_(broken)


def _is_known_finite(gradient: Tensor) -> bool:
    """Return whether all of a gradient is finite for sure, if reading that waits for nothing.

    In one function, since a call of Python's takes 3 µs where a backward has emptied the caches.
    """
    if not gradient.is_cpu or type(gradient) is not Tensor or torch.compiler.is_compiling():
        return False
    if gradient.is_sparse or gradient.is_complex():
        return False
    # A sum is finite only if all of it is; one that overflows leaves it open.
    return math.isfinite(gradient.sum().item())


def _on_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
    return register(hook)
