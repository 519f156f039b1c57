"""A run on a GPU: the CPU's run but for rounding, everything where the host is, no step waits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import esper
from esper.experiments import prepare
from esper.experiments.config import load_run_config
from esper.lifecycle.events import EventRecord, SeedCommitted, SeedGerminated
from esper.policies.named import named_policy
from esper.training.growth import Growth
from esper.training.trainer import Trainer
from esper.training.trainer_config import TrainerConfig
from waiting import waiting_raises

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Events:
    """A sink that keeps events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def publish(self, record: EventRecord) -> None:
        self.events.append(record.event)

    def measure(self, epoch: int, step: int, metrics: Any) -> None:
        pass

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("task", ["digits", "text"])
def test_a_network_grows_on_a_gpu_as_on_the_cpu(task: str) -> None:
    first, final = {}, {}
    for device in ("cpu", "cuda"):
        options = {"device": device, "trainer": {"epochs": 12 if task == "digits" else 4}}
        config = load_run_config(task, None, [], options)
        events = Events()
        run = prepare(config, sinks=[events])
        reports = list(run.reports)
        first[device], final[device] = reports[0].train_loss, run.finish()["loss"]
        assert any(isinstance(event, SeedGerminated) for event in events.events)
        assert any(isinstance(event, SeedCommitted) for event in events.events)
        where = {tensor.device.type for tensor in run.setup.model.state_dict().values()}
        assert where == {device}
        assert reports[-1].cost.total.flops
    assert first["cuda"] == pytest.approx(first["cpu"], rel=1e-3)
    assert final["cuda"] == pytest.approx(final["cpu"], rel=0.2)


def test_no_step_of_the_trainer_waits_for_the_gpu() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)
    ).cuda()
    slots = esper.attach(model, ["0"], example=torch.zeros(2, 4, device="cuda"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    growth = Growth(slots, optimizer, policy=named_policy("none", random_seed=0))
    slots["0"].germinate("mlp")
    slots["0"].advance(force=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(5):
            yield torch.randn(16, 4), torch.randint(0, 3, (16,))
        with waiting_raises():
            for _ in range(15):
                yield torch.randn(16, 4), torch.randint(0, 3, (16,))

    class Batches:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return batches()

    config = TrainerConfig(epochs=1)
    trainer = Trainer(growth, Batches(), loss=cross_entropy, evaluate=lambda: 1.0, config=config)
    (report,) = trainer.fit()
    assert report.step == 20
