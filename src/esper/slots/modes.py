"""Running a model for a measurement and leaving it as it was."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is, and so its inputs go; CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def sole_device(model: nn.Module) -> torch.device | None:
    """Return where all of a model's parameters are; None if they are on several devices."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put every module in eval mode and restore each one's own mode afterwards."""
    return _in_mode(model, training=False)


def training_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put every module in train mode and restore each one's own mode afterwards."""
    return _in_mode(model, training=True)


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        # Through `train`, which may do more than set a flag: LoRA layers merge their weights there.
        for module, mode in modes:  # outer ones first, whose `train` reaches those inside
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


@contextmanager
def unchanged_buffers(model: nn.Module, *, besides: nn.Module | None = None) -> Iterator[None]:
    """Give every buffer back its tensor and its values afterwards, also those that eval changes.

    A name that had no tensor has none again, and names that have come are gone. Lazy buffers have
    no values to be given back.

    Args:
        model: Whose buffers, those of all modules in it.
        besides: A part of the model whose buffers may change.
    """
    free = set() if besides is None else set(besides.modules())
    modules = [module for module in model.modules() if module not in free]
    # named_buffers() leaves out names without a tensor.
    tensors = [(module._buffers, dict(module._buffers)) for module in modules]  # noqa: SLF001
    kept = [
        (buffer, without_repeats(buffer).clone())
        for _, buffers in tensors
        for buffer in buffers.values()
        if buffer is not None and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                place = without_repeats(buffer)
                if place.shape == values.shape:
                    place.copy_(values)
                else:  # resized, as observers of quantisation are by their first features
                    buffer.data = values
        for own, buffers in tensors:
            own.clear()
            own.update(buffers)


class MadeParametersError(ValueError):
    """A forward gave a module parameters that learn, which it had not before."""


@contextmanager
def unchanged_attributes(model: nn.Module) -> Iterator[None]:
    """Let every module have the attributes, parameters and children afterwards that it had.

    Not what is inside them: a list that has grown stays as long as it is. A lazy module that has
    become another one is that.

    Raises:
        MadeParametersError: A module has parameters that learn where it had none; they are gone.
    """
    kept = [
        (path, module, type(module), [(own, dict(own)) for own in _attributes_of(module)])
        for path, module in model.named_modules()
    ]
    known = set(model.parameters())
    try:
        yield
        for path, module, kind, (_, (_, parameters), (_, children)) in kept:
            if type(module) is kind:
                _refuse_made(path, module, {**parameters, **children}, known)
    finally:
        for _, module, kind, attributes in kept:
            if type(module) is kind:
                for own, had in attributes:
                    own.clear()
                    own.update(had)


def _refuse_made(
    path: str, module: nn.Module, had: Mapping[str, Any], known: set[nn.Parameter]
) -> None:
    """Raise if a module has new parameters that learn under a name where it had nothing."""
    names = dict.fromkeys(
        place.partition(".")[0]
        for place, parameter in module.named_parameters()
        if parameter.requires_grad and parameter not in known
    )
    made = [name for name in names if had.get(name) is None]
    if made:
        where = f"module {path!r}" if path else "the model"
        raise MadeParametersError(
            f"{where} ({type(module).__name__}) made {', '.join(map(repr, made))} in its forward, "
            "with parameters that learn. They would be made anew in the first step of training, "
            "in no optimizer that was built before; run the model once before esper.attach, so "
            "that it has them"
        )


def _attributes_of(module: nn.Module) -> list[dict[str, Any]]:
    own = vars(module)
    return [own, own["_parameters"], own["_modules"]]


@contextmanager
def unchanged_parameters(model: nn.Module) -> Iterator[None]:
    """Give every parameter its storage and its bits back afterwards.

    A forward may move some itself, as codebooks by moving averages, and through `.data`, which no
    version counter sees. Copies are kept in main memory, since a model may fill a device. Left out
    are parameters that are no plain tensors: lazy, on the meta device, sparse, of another class.
    """
    kept = [
        (parameter, parameter.data, without_repeats(parameter.data).to("cpu", copy=True))
        for parameter in model.parameters()
        if _has_plain_memory(parameter)
    ]
    try:
        yield
    finally:
        for parameter, data, values in kept:
            place = without_repeats(data)
            if not torch.equal(_bits(place.cpu()), _bits(values)):
                place.copy_(values)
            if not parameter.is_set_to(data):
                parameter.data = data


def _has_plain_memory(parameter: nn.Parameter) -> bool:
    if is_lazy(parameter) or parameter.is_meta:
        return False
    return type(parameter.data) is Tensor and parameter.layout is torch.strided


def _bits(tensor: Tensor) -> Tensor:
    """Return the tensor as integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return numbers.view(_INTEGERS[numbers.element_size()])


def without_repeats(tensor: Tensor) -> Tensor:
    """Return a view of all memory of a tensor that `expand` may have made, each place once.

    torch refuses to write to a tensor in which a place is there twice.
    """
    if tensor.layout is not torch.strided:
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


@contextmanager
def beside_the_step(model: nn.Module, *, besides: nn.Module | None = None) -> Iterator[None]:
    """Record gradients, and leave random streams and buffers as they were.

    Args:
        model: What will run inside.
        besides: A part of it whose buffers may change.
    """
    with (
        _other_streams_unchanged(),
        _forked_torch_streams({parameter.device for parameter in model.parameters()}),
        unchanged_buffers(model, besides=besides),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Keep the random streams of Python, NumPy, the CPU and `device` from what happens inside."""
    with _other_streams_unchanged(), _forked_torch_streams([device]):
        yield


@contextmanager
def _forked_torch_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """Keep torch's random streams of the CPU and of devices from what happens inside."""
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        yield


@contextmanager
def _other_streams_unchanged() -> Iterator[None]:
    """Put the streams of Python, and of NumPy if it is in use, back as they were.

    It takes a part of a millisecond, which is little beside a pass and much in every step.
    """
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    other = None if numpy is None else numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(other)


def seed_random_state(device: torch.device, random_seed: int) -> None:
    """Seed the random streams of the CPU and of `device`, and of no other device."""
    torch.default_generator.manual_seed(random_seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(random_seed)


class SeparateRandomStream:
    """A random stream of a seed's own, so that its dropout takes nothing from the host's.

    Args:
        random_seed: Where the stream starts.
    """

    def __init__(self, random_seed: int) -> None:
        generator = torch.Generator().manual_seed(random_seed)
        self._cpu_state = generator.get_state()
        self._cuda_seed = random_seed
        self._cuda_state: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands; tensors are copies."""
        cuda = None if self._cuda_state is None else self._cuda_state.clone()
        return {"cpu": self._cpu_state.clone(), "cuda": cuda, "cuda_seed": self._cuda_seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream stood that the state is of."""
        self._cpu_state, self._cuda_state = state["cpu"], state["cuda"]
        self._cuda_seed = state["cuda_seed"]

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Draw from this stream inside the block. No host–device synchronisation."""
        with _forked_torch_streams([device]):
            if device.type == "cuda" and self._cuda_state is None:
                seed_random_state(device, self._cuda_seed)
            elif self._cuda_state is not None:
                torch.cuda.set_rng_state(self._cuda_state, device)
            torch.set_rng_state(self._cpu_state)
            yield
            self._cpu_state = torch.get_rng_state()
            if device.type == "cuda":
                self._cuda_state = torch.cuda.get_rng_state(device)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let the stream go on afterwards as if nothing had been drawn inside the block."""
        kept = self._cpu_state, self._cuda_state
        try:
            yield
        finally:
            self._cpu_state, self._cuda_state = kept
