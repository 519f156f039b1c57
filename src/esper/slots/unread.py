"""Features that nobody reads: a seed behind them would change nothing, and never learn."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from esper.slots.nested import replace_first, tensors_in
from esper.slots.probe import run_on_example


def unread_features(model: nn.Module, locations: Mapping[str, nn.Module], example: Any) -> set[str]:
    """Return the locations whose features, once returned, are dropped as they are.

    That is certain where, in eval mode and in train mode, nothing depends on them by autograd that
    still exists when the forward has ended, be it output, attribute or what a hook has kept, no
    function of torch has got them, and other ones in their place change no bit of the output.
    Everything else counts as read: what is computed from them and then dropped too, and all where
    the model cannot run so.

    Args:
        model: The host.
        locations: Its modules by path; each runs once in eval mode.
        example: As `attach` takes it; the model runs on it.

    Raises:
        ValueError: The model cannot run on it in eval mode without gradient either.

    Effects: the model runs once in eval mode, with gradient and nothing saved for a backward; where
    that raises, once more without. Where some seem to be unread it runs up to three times more, and
    twice for each that still does.
    """
    try:
        unread = _without_dependents(model, locations, example, training=False)
    except Exception:  # noqa: BLE001 – as of one that takes a gradient in its forward
        run_on_example(model, example)
        return set()
    try:
        if unread:
            unread &= _without_dependents(model, locations, example, training=True)
        for training in (False, True):
            if unread:
                unread -= _given_to_functions(model, locations, example, training=training)
        return {path for path in unread if not _change_output(model, locations[path], example)}
    except Exception:  # noqa: BLE001 – whatever the host wants in train mode
        return set()


class _Mark:
    """Lives as long as something that depends on the features it was put on."""


class _Marked(torch.autograd.Function):
    """Returns features as they are, and puts a mark on them."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, _learning: Tensor, mark: _Mark) -> Tensor:
        ctx.mark = mark
        return features.clone()


def _without_dependents(
    model: nn.Module, locations: Mapping[str, nn.Module], example: Any, *, training: bool
) -> set[str]:
    """Return the locations on whose features, by autograd, nothing depends that is left at the end.

    Not those that run where the host has turned gradients off.
    """
    marks: dict[str, list[weakref.ref[_Mark]]] = {}
    learning = torch.zeros((), requires_grad=True)
    unread: set[str] = set()

    def marked(path: str, features: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return features
        mark = _Mark()
        marks.setdefault(path, []).append(weakref.ref(mark))
        result: Tensor = _Marked.apply(features, learning, mark)  # type: ignore[no-untyped-call]
        return result

    def look(*_: Any) -> None:  # while the output lives, and the attributes that are taken back
        unread.update(path for path, own in marks.items() if not any(mark() for mark in own))

    def run() -> None:
        with (
            warnings.catch_warnings(action="ignore"),  # as of numbers read from what has a gradient
            _outside_of_graphs(model),
            saved_tensors_hooks(lambda _: None, _refuse_backward),
        ):
            run_on_example(model, example, training=training, gradient=True)

    _with_hooks(run, locations, marked, model.register_forward_hook(look))
    return unread


@contextmanager
def _outside_of_graphs(model: nn.Module) -> Iterator[None]:
    """Let no tensor of the model's, as a buffer that is written into, become part of a graph."""
    learning = {tensor for tensor in _own_tensors(model) if tensor.requires_grad}
    try:
        yield
    finally:
        for tensor in _own_tensors(model):
            if tensor.requires_grad and tensor not in learning:
                tensor.detach_()


def _own_tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters, buffers, and other tensors in attributes of modules."""
    return [tensor for module in model.modules() for tensor in tensors_in(vars(module))]


def _given_to_functions(
    model: nn.Module, locations: Mapping[str, nn.Module], example: Any, *, training: bool
) -> set[str]:
    """Return the locations whose features any function or method of torch is called with."""
    reading = _Reading()

    def run() -> None:
        with reading:
            run_on_example(model, example, training=training)

    _with_hooks(run, locations, reading.watched)
    return reading.read


def _change_output(model: nn.Module, location: nn.Module, example: Any) -> bool:
    """Return whether the output is another one with other features, as an extension may read them.

    Called only where no function of torch does, to which what is no number could be an index.
    """
    outputs: list[list[Tensor]] = []
    for value in (0.0, torch.nan):

        def filled(_path: str, features: Tensor, value: float = value) -> Tensor:
            return torch.full_like(features, value)

        def run() -> None:
            outputs.append(tensors_in(run_on_example(model, example)))

        _with_hooks(run, {"": location}, filled)
    same = all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    return not (outputs[0] and same)


class _Reading(TorchFunctionMode):
    """Notes which of some tensors functions and methods of torch are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._paths: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets the identity of one

    def watched(self, path: str, features: Tensor) -> Tensor:
        """Return a copy whose readers are noted under the path."""
        copy = features.clone()
        self._kept.append(copy)
        self._paths[id(copy)] = path
        return copy

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note what the function is called with, and call it."""
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self._paths:
                self.read.add(self._paths[id(tensor)])
        return function(*args, **(kwargs or {}))


def _with_hooks(
    run: Callable[[], None],
    locations: Mapping[str, nn.Module],
    replacement: Callable[[str, Tensor], Tensor],
    *others: Any,
) -> None:
    """Run with the locations' features replaced, and take all hooks away afterwards."""

    def replacing(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            features = output if isinstance(output, Tensor) else output[0]
            return replace_first(output, replacement(path, features))

        return hook

    handles = [
        *others,
        *(module.register_forward_hook(replacing(path)) for path, module in locations.items()),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _refuse_backward(_: Any) -> Never:
    raise RuntimeError("esper.attach runs the model without anything kept for a backward")
