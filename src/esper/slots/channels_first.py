"""Telling features `B C T`, as 1-d convolutions make them, from `B T D`, which slots take.

Both have three dimensions. What made them tells: in one run of the host, which modules gave out
channels first, and which handed that on.

Legend: B batch, C channels, T time steps or tokens, D features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MAKE_CHANNELS_FIRST = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.GroupNorm,
    nn.AvgPool1d,
    nn.MaxPool1d,
    nn.MaxUnpool1d,
    nn.LPPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)
_MAKE_FEATURES_LAST = {
    kind.forward
    for kind in (
        nn.Linear,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.MultiheadAttention,
        nn.RNN,
        nn.GRU,
        nn.LSTM,
    )
}
"""Compared instead of classes: one derived from them may transpose in a forward of its own."""
_CHANNELS = ("out_channels", "num_features", "num_channels")


class _Layout(NamedTuple):
    """What tells a tensor `B C T` from its like, transposed."""

    channels: int
    steps: int
    is_outer: bool
    """C is outside T in memory; in `B T C`, transposed, it is the other way round."""
    storage: int

    @classmethod
    def of(cls, features: Tensor) -> "_Layout":
        _, channels, steps = features.shape
        is_outer = features.stride(1) >= features.stride(2)
        return cls(channels, steps, is_outer, features.untyped_storage().data_ptr())

    @property
    def is_square(self) -> bool:
        """There are as many channels as time steps, and the shape tells nothing."""
        return self.channels == self.steps

    def matches(self, made: "_Layout") -> bool:
        """Return whether this may be what was made channels first, or a part of it."""
        if self.is_square:
            return self.storage == made.storage and self.is_outer == made.is_outer
        same_steps = self.steps == made.steps
        return self.channels == made.channels and (same_steps or self.is_outer == made.is_outer)


class ChannelsFirst:
    """Notes, as a forward hook of a host's modules, who makes `B C T` and who hands it on.

    Torch's 1-d convolutions and poolings make it, and norms of channels; a module without children
    hands it on that was given it and keeps one of C and T where it was, as activations, dropout
    and padding do; any other one ends it. What functions do between modules is not seen: a
    transposition shows in the shape, but for features with as many time steps as channels, which
    count as `B C T` only if they lie in the memory of what such a module gave out; and a
    convolution by a function does not show.
    """

    def __init__(self) -> None:
        self._made: list[_Layout] = []

    def watch(self, model: nn.Module) -> list[Any]:
        """Register the hooks with a model's modules; return their handles."""
        return [
            module.register_forward_hook(self._note, with_kwargs=True)
            for module in model.modules()
            if isinstance(module, _MAKE_CHANNELS_FIRST)
            or type(module).forward in _MAKE_FEATURES_LAST
            or not any(module.children())
        ]

    def describes(self, features: Tensor) -> bool:
        """Return whether features that came out just now have channels in dimension 1 of three."""
        if not _is_dense(features):
            return False
        layout = _Layout.of(features)
        return any(layout.matches(made) for made in self._made)

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        features = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(features, Tensor) or not _is_dense(features):
            return
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if _makes_channels_first(module, features) or (
            type(module).forward not in _MAKE_FEATURES_LAST
            and given is not None
            and self.describes(given)
            and _hands_on(_Layout.of(given), _Layout.of(features))
        ):
            self._made.append(_Layout.of(features))
        else:
            self._made.clear()


def _is_dense(features: Tensor) -> bool:
    """Return whether a tensor has three dimensions with a stride each."""
    return features.ndim == 3 and features.layout is torch.strided and not features.is_nested


def _makes_channels_first(module: nn.Module, features: Tensor) -> bool:
    kind = next((kind for kind in _MAKE_CHANNELS_FIRST if isinstance(module, kind)), None)
    if kind is None or type(module).forward is kind.forward:
        return kind is not None
    # One with a forward of its own may transpose.
    channels = [getattr(module, name) for name in _CHANNELS if hasattr(module, name)]
    return features.shape[1] in channels and not _Layout.of(features).is_square


def _hands_on(given: _Layout, made: _Layout) -> bool:
    if made.is_square and given.is_outer != made.is_outer:
        return False
    return given.channels == made.channels or given.steps == made.steps
