"""Training runs of a tiny host for episodes: two slots, dropout, a fraction of a second each."""

import itertools
import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper.rl import DecidedOutside, GrowthEnv, HostRun
from growth_problem import LENIENT

SLOTS = ("first", "second")
CONFIG = esper.SlotConfig(ramp_steps=4, embargo_epochs=1, thresholds=LENIENT)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(features)))
        output: Tensor = self.head(self.second(hidden)).squeeze(1)
        return output


@dataclass(frozen=True)
class TinyRuns:
    """Makes runs; the global random streams give weights, masks and the order of the data.

    Attributes:
        bad_losses: Which of the training losses, from 1, are NaN: what the safeguard goes back of.
    """

    epochs: int = 8
    learning_rate: float = 1e-2
    batch_size: int = 16
    count_flops: bool = False
    targets: tuple[str, ...] = SLOTS
    config: esper.SlotConfig = CONFIG
    bad_losses: Container[int] = ()

    def __call__(self, random_seed: int, policy: esper.Policy | None = None) -> HostRun:
        model = TwoLayers()
        data = torch.Generator().manual_seed(random_seed)
        features = torch.randn(96, 4, generator=data)
        targets = features[:, 0] + features[:, 1] * features[:, 2]
        slots = esper.attach(
            model,
            list(self.targets),
            example=features[:2],
            config=self.config.model_copy(update={"random_seed": random_seed}),
        )
        growth = esper.Growth(
            slots,
            torch.optim.Adam(model.parameters(), lr=self.learning_rate),
            policy=policy or DecidedOutside(),
            max_epochs=self.epochs,
            clock=lambda: 0.0,
            count_flops=self.count_flops,
        )
        shuffled = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(features[:64], targets[:64]),
            batch_size=self.batch_size,
            shuffle=True,
        )
        held_out, final = (
            esper.HeldOut(
                model,
                [(features[part], targets[part])],
                loss=lambda output, target: mse_loss(output, target, reduction="none"),
            )
            for part in (slice(64, 80), slice(80, 96))
        )
        numbers = itertools.count(1)

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return mse_loss(output, target) * (math.nan if next(numbers) in self.bad_losses else 1)

        trainer = esper.Trainer(
            growth,
            shuffled,
            loss=loss,
            evaluate=held_out,
            config=esper.TrainerConfig(epochs=self.epochs),
        )
        return HostRun(trainer=trainer, final=final)


def make_env() -> GrowthEnv:
    """Return an environment, also in a process of its own."""
    return GrowthEnv(TinyRuns())
