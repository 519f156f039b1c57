"""A small convolutional host that grows, eagerly and compiled."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import mse_loss

import esper
from esper import SlotConfig
from esper.compilation import CompiledHost, CompileService
from esper.seeds import Seed, zero_initialise_

WIDTH = 8
BATCHES = torch.randn(6, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.relu(self.norm(self.convolution(features)))


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(images))).mean(dim=(2, 3)))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Run:
    """A growing host with its optimizer."""

    def __init__(
        self,
        *,
        compiled: bool,
        backend: str = "aot_eager",
        service: CompileService | None = None,
        device: str = "cpu",
        **config: Any,
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.host = Host().to(device)
        self.slots = esper.attach(
            self.host,
            ["first", "second"],
            example=BATCHES[0].to(device),
            config=SlotConfig(max_committed=4, embargo_epochs=0, **config),
        )
        self.optimizer = torch.optim.SGD(self.host.parameters(), lr=0.05, momentum=0.9)
        self.slots.bind(self.optimizer)
        self.compiled = (
            CompiledHost(self.slots, service=service, backend=backend) if compiled else None
        )
        self.events: list[Any] = []
        self.compiled_in_steps = 0
        self.losses: list[float] = []
        self.number = 0
        self.samples = BATCHES.shape[1]

    def loss(self) -> Tensor:
        images = BATCHES[self.number % len(BATCHES)]
        images = torch.cat([images, images])[: self.samples].to(self.device)
        return mse_loss(self.host(images), images.mean(dim=(2, 3))[:, :2])

    def prepare(self) -> list[Any]:
        events = self.compiled.prepare() if self.compiled and self.compiled.due() else []
        self.events += events
        return events

    def step(self) -> float:
        before = graphs()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()
        self.number += 1
        self.compiled_in_steps += graphs() - before
        self.prepare()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def live(self, path: str, blueprint: str, **options: Any) -> Iterator[None]:
        """Take a seed through its life, a stop at each stage."""
        slot = self.slots[path]
        slot.germinate(blueprint, **options)
        yield
        slot.advance(force=True)
        if slot.isolation is esper.lifecycle.learning.Isolation.NONE:
            slot.advance(force=True)
        else:
            yield
            slot.advance(force=True)
        slot.set_alpha_target(1.0, 2)
        yield
        slot.advance(force=True)
        yield
        slot.advance(force=True)
        yield
        slot.commit()
        yield


class Wrong(Seed):
    """Computes something else, or raises, when it is compiled."""

    def __init__(self, dim: int, *, raises: bool) -> None:
        super().__init__()
        self.layer = zero_initialise_(nn.Conv2d(dim, dim, 1))
        self.raises = raises

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.layer,)

    def increment(self, features: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if self.raises:
                torch._dynamo.graph_break()
            features = 2.0 * features
        return self.layer(features)


class WrongImaginary(Wrong):
    """Computes the same when it is compiled, but another gradient of an imaginary part."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, raises=False)
        self.filter = nn.Parameter(torch.ones(dim, 1, 1, dtype=torch.complex64))

    def increment(self, features: Tensor) -> Tensor:
        factor = 3.0 if torch.compiler.is_compiling() else 1.0
        return self.layer(features * (self.filter.real + factor * self.filter.imag))
