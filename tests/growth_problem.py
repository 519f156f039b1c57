"""A small problem that a linear host cannot solve and a grown one can."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.events import Event, EventRecord

TEST_CONFIG = esper.SlotConfig(isolation="shadowing", ramp_steps=10, embargo_epochs=1)

LENIENT = {
    "min_training_steps": 4,
    "min_gradient_ratio": 0.0,
    "min_contribution_fraction": -9.0,
    "min_over_linear_fraction": None,
    "max_linear_share": 1.0,
    "max_loss_increase_fraction": 9.0,
    "min_line_search_gain_fraction": -9.0,
    "standard_errors": 0.0,
    "trial_epochs": 2,
}
"""Thresholds that let a seed through every gate, and soon."""


@dataclass
class Recorder:
    """A sink that keeps everything."""

    records: list[EventRecord] = field(default_factory=list)
    metrics: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)

    def publish(self, record: EventRecord) -> None:
        self.records.append(record)

    def measure(self, epoch: int, step: int, metrics: Any) -> None:
        self.metrics.append((epoch, step, dict(metrics)))

    def flush(self) -> None:
        pass

    def of(self, *kinds: type[Event]) -> list[Any]:
        return [record.event for record in self.records if isinstance(record.event, kinds)]


class LinearHost(nn.Module):
    """Predicts a quadratic function linearly: capacity is missing by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.head(self.embed(features)).squeeze(1)
        return output


@dataclass
class Problem:
    model: nn.Module
    slots: esper.SlotSet
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor]]
    held_out: esper.HeldOut
    recorder: Recorder

    def trainer(self, policy: esper.Policy, epochs: int, **settings: Any) -> esper.Trainer:
        scheduler = settings.pop("scheduler", None)
        evaluate = settings.pop("evaluate", self.held_out)
        loss = settings.pop("loss", mse_loss)
        count_flops = settings.pop("count_flops", False)
        compiled = settings.pop("compiled", None)
        growth = esper.Growth(
            self.slots,
            self.optimizer,
            policy=policy,
            scheduler=scheduler,
            max_epochs=epochs,
            sinks=[self.recorder],
            clock=lambda: 0.0,
            count_flops=count_flops,
            compiled=compiled,
        )
        config = esper.TrainerConfig(epochs=epochs, **settings)
        return esper.Trainer(
            growth,
            self.batches,
            loss=loss,
            evaluate=evaluate,
            config=config,
            scheduler=scheduler,
        )


def quadratic(features: Tensor) -> Tensor:
    return features[:, 0] + features[:, 1] * features[:, 2]


def make_problem(
    *, config: esper.SlotConfig = TEST_CONFIG, learning_rate: float = 1e-2, seed: int = 0
) -> Problem:
    torch.manual_seed(seed)
    model = LinearHost()
    features = torch.randn(768, 4)
    targets = quadratic(features)
    slots = esper.attach(model, "embed", example=features[:2], config=config)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    batches = list(zip(features[:512].split(32), targets[:512].split(32), strict=True))
    held_out = esper.HeldOut(
        model,
        [(features[512:], targets[512:])],
        loss=lambda output, target: mse_loss(output, target, reduction="none"),
    )
    return Problem(model, slots, optimizer, batches, held_out, Recorder())
