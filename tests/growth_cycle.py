"""One growth cycle for any model: train, grow in every slot, commit."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import esper
from esper.lifecycle.actions import Germinate
from esper.lifecycle.gates import GateThresholds

EPOCHS = 9
LENIENT = GateThresholds(
    min_training_steps=2,
    min_gradient_ratio=0.0,
    max_gradient_ratio=1e12,
    min_line_search_gain_fraction=-1e12,
    min_steps_at_target=2,
    max_loss_increase_fraction=1e12,
    min_contribution_fraction=-1e12,
    max_linear_share=1.0,
    min_over_linear_fraction=None,
    trial_epochs=1,
)
"""These tests are of the machinery; whether a seed deserves to stay is tested elsewhere."""

Inputs = Tensor | Mapping[str, Tensor]


def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the model's logits, in eval mode and without gradient."""
    model.eval()
    with torch.no_grad():
        return logits_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def logits_of(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def attach(model: nn.Module, targets: str | Sequence[str], example: Inputs) -> esper.SlotSet:
    config = esper.SlotConfig(thresholds=LENIENT, ramp_steps=2)
    return esper.attach(model, targets, example=example, config=config)


def grow(
    slots: esper.SlotSet, inputs: Inputs, targets: Tensor, blueprint: str, **options: Any
) -> list[float]:
    """Train on one batch and grow in every slot; return the training loss by epoch."""

    def loss(outputs: Any, wanted: Tensor) -> Tensor:
        logits = logits_of(outputs).flatten(0, -2)
        return nn.functional.cross_entropy(logits, wanted.flatten())

    def sample_losses(outputs: Any, wanted: Tensor) -> Tensor:
        logits = logits_of(outputs).movedim(-1, 1)
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        return losses.reshape(len(wanted), -1).mean(dim=1)

    seeds = [Germinate(slot=path, blueprint=blueprint, options=options) for path in slots]
    optimizer = torch.optim.AdamW(slots.model.parameters(), lr=1e-3)
    growth = esper.Growth(slots, optimizer, policy=esper.PlannedPolicy({1: seeds}))
    trainer = esper.Trainer(
        growth,
        [(inputs, targets)] * 4,
        loss=loss,
        evaluate=esper.HeldOut(slots.model, [(inputs, targets)], loss=sample_losses),
        config=esper.TrainerConfig(epochs=EPOCHS),
    )
    return [report.train_loss for report in trainer.run()]


def committed(slots: esper.SlotSet) -> dict[str, list[str]]:
    return {path: [seed.blueprint for seed in slot.committed] for path, slot in slots.items()}
