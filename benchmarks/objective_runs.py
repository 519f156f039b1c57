"""One run of benchmarks/seed_objective.py: a host, a seed's objective, and what came of it."""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import esper
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import AmplitudeSearched, EventRecord
from esper.lifecycle.gates import GateThresholds
from esper.lifecycle.learning import Isolation
from esper.slots import SeedSlot
from esper.slots.modes import evaluation_mode
from objective_hosts import OPTIMIZERS, HostCase, evaluation, mean_loss

STEPS_AFTER = 600
DECAY_STEPS = 200
DECISION_STEPS = 25
BEHIND_STEPS = 150
TRACE_STEPS = 5
PATIENCE_EPOCHS = 10

Key = tuple[str, int, str, str, str, int, str]

GATES = ("lax", "default", "unasked")
"""Those of the task whose data the host is trained on, the default ones, and the task's without the
comparison with a linear map."""


@dataclass
class Result:
    """One finished run; losses on held-out data, None where the run has no such figure."""

    kind: str
    """`life`, or `behind` for a seed that is never blended."""
    germination_step: int
    host: str
    optimizer: str
    arm: str
    seed: int
    gates: str = "lax"
    final_loss: float = math.nan
    best_amplitude: float | None = None
    best_amplitude_loss: float | None = None
    blended: bool = False
    committed: bool = False
    trace: list[tuple[int, float]] = field(default_factory=list)
    """Step and validation loss while BLENDING, or throughout without a seed."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Steps behind the host, ‖u‖/‖h‖, loss at alpha 1 over the loss without the seed."""

    @property
    def residual(self) -> float | None:
        """‖u‖/‖h‖, last time behind the host."""
        return self.curve[-1][1] if self.curve else None

    @property
    def full_alpha(self) -> float | None:
        """Loss at alpha 1 over the loss without the seed, last time behind the host."""
        return self.curve[-1][2] if self.curve else None

    @property
    def key(self) -> Key:
        cell = self.germination_step, self.host, self.optimizer
        return self.kind, *cell, self.arm, self.seed, self.gates


class LineSearches:
    """A sink that keeps the last line search."""

    def __init__(self) -> None:
        self.last: AmplitudeSearched | None = None

    def publish(self, record: EventRecord) -> None:
        if isinstance(record.event, AmplitudeSearched):
            self.last = record.event

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass


def thresholds(case: HostCase, gates: str) -> GateThresholds:
    """Return the gates that seeds in a host have to pass, by name."""
    if gates == "default":
        return GateThresholds()
    if gates == "unasked":
        return case.thresholds.model_copy(update={"min_over_linear_fraction": None})
    return case.thresholds


def slot_config(arm: str, gates: GateThresholds) -> esper.SlotConfig:
    """Return what an arm's name says: an objective, with c behind a colon if not the default."""
    limits = gates.model_copy(update={"min_training_steps": BEHIND_STEPS})
    if arm == "live":
        return esper.SlotConfig(isolation=Isolation.NONE, thresholds=limits)
    objective, _, fraction = arm.partition(":")
    options: dict[str, Any] = {"trust_fraction": float(fraction)} if fraction else {}
    return esper.SlotConfig(
        isolation=Isolation.SHADOWING, objective=objective, thresholds=limits, **options
    )


def relative_size(model: nn.Module, slot: SeedSlot, inputs: Tensor) -> float:
    """Return mean‖u‖ / mean‖h‖ of the living seed on a batch, norms per sample."""
    seen: list[Tensor] = []
    handle = slot.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with evaluation_mode(model), torch.inference_mode(), slot.force_alpha(0.0):
            model(inputs)
            features = seen[0]
            increment = slot.living(features, features)
    finally:
        handle.remove()
    sizes = [tensor.flatten(1).norm(dim=1).mean() for tensor in (increment, features)]
    return float(sizes[0] / sizes[1])


class Start:
    """A host trained up to the step at which seeds are germinated, the same for every arm."""

    def __init__(self, case: HostCase, optimizer: str, seed: int, step: int) -> None:
        torch.manual_seed(seed)
        self.case, self.optimizer_name, self.seed, self.step = case, optimizer, seed, step
        self.model = case.build()
        rate = case.learning_rates[optimizer]
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), rate)
        batches = case.batches(seed)
        for _ in range(step):
            inputs, targets = next(batches)
            mean_loss(self.model(inputs), targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.batches = [next(batches) for _ in range(STEPS_AFTER)]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.case.name, self.optimizer_name, self.seed, self.step


class Run:
    """One arm from there on, step by step."""

    def __init__(self, start: Start, arm: str, kind: str, gates: str) -> None:
        case = start.case
        self.model, self.optimizer = copy.deepcopy((start.model, start.optimizer))
        self.batches = itertools.cycle(start.batches)
        validation, test = case.held_out()
        self.inputs = validation[0]
        self.validation = evaluation(self.model, validation)
        self.test = evaluation(self.model, test)
        place = start.step, case.name, start.optimizer_name
        self.result = Result(kind, *place, arm, start.seed, gates)
        config = slot_config("plain" if arm == "none" else arm, thresholds(case, gates))
        slots = esper.attach(self.model, case.target, example=self.inputs[:2], config=config)
        self.slot = slots[case.target]
        self.searches = LineSearches()
        germinate = Germinate(slot=case.target, blueprint=case.blueprint)
        self.growth = esper.Growth(
            slots,
            self.optimizer,
            policy=esper.PlannedPolicy(
                {} if arm == "none" else {1: [germinate]},
                tend_seeds=kind == "life",
                patience_epochs=PATIENCE_EPOCHS,
            ),
            sinks=[self.searches],
        )

    def step(self) -> None:
        inputs, targets = next(self.batches)
        self.growth.shadow_pass(lambda: mean_loss(self.model(inputs), targets))
        mean_loss(self.model(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.growth.after_step()

    def go(self) -> Result:
        """Germinate the seed, train to the end, and return what came of it."""
        result, slot, lives = self.result, self.slot, self.result.kind == "life"
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (STEPS_AFTER - step) / DECAY_STEPS) if lives else 1.0,
        )
        self.growth.after_epoch(self.validation)
        for step in range(1, STEPS_AFTER + 1):
            self.step()
            scheduler.step()
            blending = slot.stage is esper.SeedStage.BLENDING
            if step % TRACE_STEPS == 0 and (blending or result.arm == "none"):
                result.trace.append((step, self.validation()["loss"]))
            if step % DECISION_STEPS == 0:
                self.decide(step)
        searched = self.searches.last
        if searched is not None:
            losses = dict(zip(searched.amplitudes, searched.losses, strict=True))
            result.best_amplitude = searched.best_amplitude
            result.best_amplitude_loss = losses[searched.best_amplitude] / searched.host_loss
        result.blended = result.arm != "none" and bool(result.trace)
        result.committed = bool(slot.committed)
        result.final_loss = self.test()["loss"]
        return result

    def decide(self, step: int) -> None:
        """Measure a seed that is behind the host, and let the gates judge."""
        result, slot = self.result, self.slot
        if slot.stage is esper.SeedStage.TRAINING:
            size = relative_size(self.model, slot, self.inputs)
            off, on = self.validation.variant_losses(
                {slot.path: slot}, [{slot.path: 0.0}, {slot.path: 1.0}]
            )
            result.curve.append((step, size, float(on.mean() / off.mean())))
        self.growth.after_epoch(self.validation)
