"""One run of benchmarks/seed_objective.py: a host, a seed's objective, and what came of it."""

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

GERMINATION_STEPS = {"early": 250, "late": 600}
STEPS_AFTER = 750
DECAY_STEPS = 300
DECISION_STEPS = 25
BEHIND_STEPS = 150
TRACE_STEPS = 5
PATIENCE_EPOCHS = 10
SWEEP = tuple(2.0**exponent for exponent in range(-5, 4))


@dataclass
class Result:
    """One finished run; losses on held-out data, None where the run has no such figure."""

    kind: str
    host: str
    optimizer: str
    arm: str
    seed: int
    final_loss: float = math.nan
    residual: float | None = None
    best_amplitude: float | None = None
    best_amplitude_loss: float | None = None
    blended: bool = False
    committed: bool = False
    trace: list[tuple[int, float]] = field(default_factory=list)
    """Step and validation loss while BLENDING, or from germination on without a seed."""
    sweep: list[float] = field(default_factory=list)
    """Loss at the amplitudes SWEEP over the loss without the seed, last time behind the host."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Steps behind the host, ‖u‖/‖h‖, loss at alpha 1 over the loss without the seed."""

    @property
    def full_alpha(self) -> float | None:
        """Loss at alpha 1 over the loss without the seed, last time behind the host."""
        return self.sweep[SWEEP.index(1.0)] if self.sweep else None

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.kind, self.host, self.optimizer, self.arm, self.seed


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


def slot_config(arm: str) -> esper.SlotConfig:
    """Return what an arm's name says: an objective, with c behind a colon if not the default."""
    limits = GateThresholds(min_training_steps=BEHIND_STEPS)
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


class Run:
    """One host with one arm, step by step."""

    def __init__(self, case: HostCase, optimizer: str, arm: str, seed: int, kind: str) -> None:
        torch.manual_seed(seed)
        self.model = case.build()
        self.batches = case.batches(seed)
        validation, test = case.held_out()
        self.inputs = validation[0]
        self.validation = evaluation(self.model, validation)
        self.test = evaluation(self.model, test)
        self.result = Result(kind, case.name, optimizer, arm, seed)
        config = slot_config("plain" if arm == "none" else arm)
        slots = esper.attach(self.model, case.target, example=self.inputs[:2], config=config)
        self.slot = slots[case.target]
        self.searches = LineSearches()
        self.germination_step = GERMINATION_STEPS[kind.removeprefix("behind, ")]
        self.steps = self.germination_step + STEPS_AFTER
        germinate = Germinate(slot=case.target, blueprint=case.blueprint)
        epoch = self.germination_step // DECISION_STEPS
        plan = {} if arm == "none" else {epoch: [germinate]}
        rate = case.learning_rates[optimizer]
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), rate)
        self.growth = esper.Growth(
            slots,
            self.optimizer,
            policy=esper.SchedulePolicy(
                plan, tend_seeds=kind in GERMINATION_STEPS, patience_epochs=PATIENCE_EPOCHS
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

    def live(self) -> Result:
        """Train through the seed's whole life and return what came of it."""
        result, slot, steps = self.result, self.slot, self.steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (steps - step) / DECAY_STEPS)
        )
        for step in range(1, steps + 1):
            self.step()
            scheduler.step()
            blending = slot.stage is esper.SeedStage.BLENDING
            reference = result.arm == "none" and step > self.germination_step
            if step % TRACE_STEPS == 0 and (blending or reference):
                result.trace.append((step, self.validation()["loss"]))
            if step % DECISION_STEPS == 0:
                self.decide()
        searched = self.searches.last
        if searched is not None:
            losses = dict(zip(searched.amplitudes, searched.losses, strict=True))
            result.best_amplitude = searched.best_amplitude
            result.best_amplitude_loss = losses[searched.best_amplitude] / searched.host_loss
        result.blended = result.arm != "none" and bool(result.trace)
        result.committed = bool(slot.committed)
        result.final_loss = self.test()["loss"]
        return result

    def behind(self) -> Result:
        """Keep the seed behind the host for good, and follow its size and what it would do."""
        for step in range(1, self.steps + 1):
            self.step()
            if step % DECISION_STEPS == 0:
                self.decide()
                if self.result.residual is not None:
                    self.note_curve(step - self.germination_step)
        self.result.final_loss = self.test()["loss"]
        return self.result

    def decide(self) -> None:
        """Measure a seed that is behind the host, and let the gates judge."""
        result, slot = self.result, self.slot
        if slot.stage is esper.SeedStage.TRAINING:
            result.residual = relative_size(self.model, slot, self.inputs)
            variants = [{slot.path: amplitude} for amplitude in (0.0, *SWEEP)]
            host, *others = self.validation.variant_losses({slot.path: slot}, variants)
            result.sweep = [float(losses.mean() / host.mean()) for losses in others]
        self.growth.after_epoch(self.validation)

    def note_curve(self, steps_behind: int) -> None:
        size, ratio = self.result.residual, self.result.full_alpha
        assert size is not None
        assert ratio is not None
        self.result.curve.append((steps_behind, size, ratio))
