"""What forwards keep count of is given back, whatever kind of buffer it is in."""

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.training.running_statistics import RunningStatistics


class Counting(nn.Module):
    """Changes its buffers in each forward, in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.lazy = nn.LazyBatchNorm1d()
        self.register_buffer("none", None)
        self.register_buffer("in_place", torch.zeros(4))
        self.register_buffer("assigned", torch.zeros(4), persistent=False)
        self.register_buffer("resized", torch.zeros(0))
        self.register_buffer("exact", torch.zeros(4, dtype=torch.complex128))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(2**20 + 1))

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            mean = features.detach().mean(0)
            self.in_place.lerp_(mean, 0.5)
            self.assigned = self.assigned.lerp(mean, 0.5)
            self.resized.resize_(4).copy_(mean)
            self.exact.add_(mean)
            self.count += 1
            self.queue.add_(1.0)
        return self.linear(features) * self.expanded


@pytest.mark.parametrize("num_good", [0, 1, 2])
def test_every_small_buffer_of_numbers_is_given_back_but_counts(num_good: int) -> None:
    torch.manual_seed(0)
    model = Counting()
    statistics = RunningStatistics(esper.attach(model, ["linear"], example=torch.zeros(2, 4)))
    for _ in range(num_good):
        statistics.keep()
        model(torch.randn(2, 4))
    statistics.keep()
    tensors = dict(model.named_buffers())
    values = {n: b.clone() for n, b in tensors.items() if not n.startswith("lazy.")}
    model(torch.full((2, 4), torch.nan))
    statistics.put_back()
    for name, value in values.items():
        buffer = model.get_buffer(name)
        assert buffer is tensors[name]
        assert torch.equal(buffer, value) is (name not in ("count", "queue")), name
