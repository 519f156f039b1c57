"""Hosts that costs are measured on, each with a batch, and seeds written into them by hand.

A training step of each takes tens of milliseconds on two cores.

Legend: B batch, C channels, H height, W width, T tokens, D features, V symbols.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper.seeds import Family, Seed, blueprints
from esper.tasks.text.host import TextHost

CHANNELS = 64
IMAGES = 16
SIDE = 32
WIDTH = 128
TOKENS = 128
SEQUENCES = 4
SYMBOLS = 256
DEPTH = 4
NUM_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class SpeedHost:
    """A network, a batch of noise to train it on, and where seeds stand in it.

    Attributes:
        model: In train mode, without slots.
        inputs: What the model is called with.
        labels: The loss's targets.
        loss: From the model's output and the labels.
        blocks: Paths of the blocks that it mostly consists of, in order.
        target: The block behind which a seed grows.
        dormant: The block behind which a slot stays dormant.
        blueprint: Of the seed.
        family: Of the seed.
        width: Of the features behind each block.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: Callable[[Any, Tensor], Tensor]
    blocks: tuple[str, ...]
    target: str
    dormant: str
    blueprint: str
    family: Family
    width: int


class ResidualCNN(nn.Module):
    """A stem, two residual blocks and a linear head on the mean over all places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.block1 = CNNBlock()
        self.block2 = CNNBlock()
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.block2(self.block1(self.stem(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class CNNBlock(nn.Module):
    """Convolution, BatchNorm and ReLU with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.relu(self.norm(self.convolution(features)))


def cnn(device: str) -> SpeedHost:
    """Return a residual CNN on images `B 3 H W`."""
    return SpeedHost(
        model=ResidualCNN().to(device),
        inputs=torch.randn(IMAGES, 3, SIDE, SIDE, device=device),
        labels=torch.randint(0, 10, (IMAGES,), device=device),
        loss=cross_entropy,
        blocks=("block1", "block2"),
        target="block1",
        dormant="block2",
        blueprint="conv_light",
        family=Family.CNN,
        width=CHANNELS,
    )


def decoder(device: str) -> SpeedHost:
    """Return the text task's host, wider and deeper, on bytes `B T`."""
    model = TextHost(width=WIDTH, depth=DEPTH, num_heads=NUM_HEADS, context=TOKENS)
    return _language_host(model.to(device), "blocks", lambda logits: logits, device)


def llama(device: str) -> SpeedHost:
    """Return a small Llama with random weights, on symbols `B T`; needs esper-lite[hf]."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 – an optional extra

    config = LlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    return _language_host(model, "model.layers", lambda output: output.logits, device)


def _language_host(
    model: nn.Module, blocks: str, logits: Callable[[Any], Tensor], device: str
) -> SpeedHost:
    """Return a host that predicts the next of random symbols.

    Args:
        model: Takes symbols, shape `B T`.
        blocks: Path of the list of blocks.
        logits: From the model's output, shape `B T V`.
        device: Of the batch.
    """
    symbols = torch.randint(0, SYMBOLS, (SEQUENCES, TOKENS + 1), device=device)
    return SpeedHost(
        model=model,
        inputs=symbols[:, :-1].contiguous(),
        labels=symbols[:, 1:].flatten(),
        loss=lambda output, labels: cross_entropy(logits(output).flatten(0, 1), labels),
        blocks=tuple(f"{blocks}.{index}" for index in range(DEPTH)),
        target=f"{blocks}.1",
        dormant=f"{blocks}.2",
        blueprint="mlp",
        family=Family.TRANSFORMER,
        width=WIDTH,
    )


HOSTS: Mapping[str, Callable[[str], SpeedHost]] = {"cnn": cnn, "decoder": decoder, "llama": llama}
"""From the device, each with weights and a batch from torch's random stream."""


def with_smallest_batch(host: SpeedHost) -> SpeedHost:
    """Return the host with a batch that hardly takes any time: a few pixels, or a few symbols."""
    if host.family is Family.CNN:
        images = host.inputs[:2, :, :4, :4].contiguous()
        return replace(host, inputs=images, labels=host.labels[:2])
    return replace(host, inputs=host.inputs[:1, :4].contiguous(), labels=host.labels[:4])


class Mix(nn.Module):
    """What a hand-written network does with the features h behind a block and its seed f."""

    def __init__(self, seed: Seed) -> None:
        super().__init__()
        self.seed = seed


class Inlined(Mix):
    """`h + f(h)`."""

    def forward(self, features: Tensor) -> Tensor:
        return features + self.seed.increment(features)


class Blended(Mix):
    """`h + a f(h)` with no gradient from the seed to the host, and a in a 0-dim buffer."""

    def __init__(self, seed: Seed) -> None:
        super().__init__(seed)
        self.register_buffer("alpha", torch.tensor(0.5))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.alpha * self.seed.increment(features.detach())


class Behind(Mix):
    """`h`, and h's gradient for the seed too."""

    def forward(self, features: Tensor) -> Tensor:
        return PlainStraightThrough.apply(features, self.seed.increment(features.detach()))


class GuardedBehind(Behind):
    """The same, and a gradient of the seed that is not finite becomes zero as it arrives."""

    def __init__(self, seed: Seed) -> None:
        super().__init__(seed)
        for parameter in seed.parameters():
            parameter.register_post_accumulate_grad_hook(zero_unless_finite)


def zero_unless_finite(parameter: Tensor) -> None:
    """Drop a broken gradient, at the price of one look at each; waits for a GPU."""
    gradient = parameter.grad
    if gradient is not None and not math.isfinite(gradient.sum().item()):
        gradient.zero_()


class PlainStraightThrough(torch.autograd.Function):
    """Forward the host; the same gradient to both."""

    @staticmethod
    def forward(ctx: object, features: Tensor, increment: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


class PulledBehind(Mix):
    """The same, and the increment is pulled towards 0 as the default objective does."""

    def forward(self, features: Tensor) -> Tensor:
        return PulledStraightThrough.apply(features, self.seed.increment(features.detach()))


class PulledStraightThrough(torch.autograd.Function):
    """Forward the host; to the seed `g + u mean‖g‖ / (0.1 mean‖h‖)`, norms by sample."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, increment: Tensor) -> Tensor:
        ctx.save_for_backward(features, increment)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        features, increment = ctx.saved_tensors
        dims = tuple(range(1, gradient.ndim))
        sizes = (torch.linalg.vector_norm(t, dim=dims).mean() for t in (gradient, features))
        pull = next(sizes) / (0.1 * next(sizes))
        return gradient, torch.addcmul(gradient, increment, pull)


class BlockWithSeed(nn.Module):
    """A host's block with a seed written behind it."""

    def __init__(self, block: nn.Module, mix: Mix) -> None:
        super().__init__()
        self.block = block
        self.mix = mix

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.mix(self.block(*args, **kwargs))


def hand_written(host: SpeedHost, mix: type[Mix] | None) -> nn.Module:
    """Return a copy of the model, with a new seed behind the target unless `mix` is None."""
    model = copy.deepcopy(host.model)
    if mix is not None:
        seed = blueprints.create(host.family, host.blueprint, host.width)
        block = BlockWithSeed(model.get_submodule(host.target), mix(seed))
        model.set_submodule(host.target, block.to(host.inputs.device))
    return model
