"""The digits task's host, trained alone and many of them as one, for benchmarks.

Legend: N hosts, B images, C channels, H height, W width.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from esper.tasks.digits.data import BATCH_IMAGES, SHIFT_PIXELS, TRAIN_IMAGES, load_splits
from esper.tasks.digits.host import DigitsHost

LEARNING_RATE = 5e-3

State = dict[str, Tensor]


class Batches:
    """What `ShiftedBatches` yields, for N hosts at once, drawn on their device.

    Args:
        num_hosts: Each gets an order and shifts of its own.
        device: Of the hosts.
    """

    def __init__(self, num_hosts: int, device: str) -> None:
        train = load_splits()[0]
        reach, (height, width) = 2 * SHIFT_PIXELS + 1, train.images.shape[-2:]
        padded = F.pad(train.images, (SHIFT_PIXELS,) * 4)
        moved = [
            padded[..., down : down + height, right : right + width]
            for down, right in itertools.product(range(reach), repeat=2)
        ]
        self._num_shifts = len(moved)
        self._images = torch.cat(moved).to(device)
        self._labels = train.labels.to(device)
        self._shape = num_hosts, TRAIN_IMAGES

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `N 50 1 8 8` and labels `N 50`."""
        order = torch.rand(self._shape, device=self._labels.device).argsort(dim=1)
        shifts = torch.randint(self._num_shifts, self._shape, device=order.device)
        images, labels = self._images[shifts * TRAIN_IMAGES + order], self._labels[order]
        yield from zip(images.split(BATCH_IMAGES, 1), labels.split(BATCH_IMAGES, 1), strict=True)


class Alone:
    """Trains one host by a plain loop; batches have a first dimension of one."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self._optimizer = torch.optim.AdamW(host.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        cross_entropy(self.host(images[0]), labels[0]).backward()
        self._optimizer.step()

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> list[list[float]]:
        """Return loss and accuracy. Waits for the device."""
        self.host.eval()
        measured = measures(self.host(images), labels)[None].tolist()
        self.host.train()
        return measured


class Stacked:
    """Trains hosts of equal structure as one, each as if alone.

    Parameters are independent of each other in AdamW, so that one optimizer of the stacked ones
    makes every host's own step. Running statistics are stacked too, and updated in place.
    """

    def __init__(self, hosts: Sequence[nn.Module]) -> None:
        self.params, self.buffers = stack_module_state(list(hosts))
        self._structure = copy.deepcopy(hosts[0]).to("meta")
        self._optimizer = torch.optim.AdamW(self.params.values(), lr=LEARNING_RATE, fused=True)
        self._gradients = vmap(grad(self._loss))
        self._measures = vmap(self._evaluated, in_dims=(0, 0, None, None))

    def step(self, images: Tensor, labels: Tensor) -> None:
        gradients = self._gradients(self.params, self.buffers, images, labels)
        for name, gradient in gradients.items():
            self.params[name].grad = gradient
        self._optimizer.step()

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> list[list[float]]:
        """Return each host's loss and accuracy. Waits for the device."""
        self._structure.eval()
        measured: list[list[float]] = self._measures(
            self.params, self.buffers, images, labels
        ).tolist()
        self._structure.train()
        return measured

    def _logits(self, params: State, buffers: State, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self._structure, (params, buffers), (images,))
        return logits

    def _loss(self, params: State, buffers: State, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._logits(params, buffers, images), labels)

    def _evaluated(self, params: State, buffers: State, images: Tensor, labels: Tensor) -> Tensor:
        return measures(self._logits(params, buffers, images), labels)


def measures(logits: Tensor, labels: Tensor) -> Tensor:
    accuracy = (logits.argmax(dim=1) == labels).to(logits.dtype).mean()
    return torch.stack([cross_entropy(logits, labels), accuracy])


def largest_difference(device: str, num_hosts: int = 4) -> float:
    """Train hosts for an epoch, in double precision, as one and each alone.

    Returns:
        By how much a parameter or running statistic differs at most.

    Raises:
        AssertionError: By more than rounding explains.
    """
    torch.manual_seed(0)
    hosts = [DigitsHost().double().to(device) for _ in range(num_hosts)]
    stacked = Stacked(copy.deepcopy(hosts))
    loops = [Alone(host) for host in hosts]
    for images, labels in Batches(num_hosts, device).epoch():
        stacked.step(images.double(), labels)
        for index, loop in enumerate(loops):
            loop.step(images[index : index + 1].double(), labels[index : index + 1])
    differences = []
    for name, state in {**stacked.params, **stacked.buffers}.items():
        together = state.detach()
        apart = torch.stack([host.state_dict()[name] for host in hosts])
        torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-9)
        differences.append(float((together - apart).abs().max()))
    return max(differences)
