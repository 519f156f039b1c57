"""The training loop, growth included."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from esper.compilation.captured_step import CapturedStep
from esper.lifecycle.events import StepSkipped
from esper.lifecycle.record import Record
from esper.slots.counterfactual import call_model
from esper.slots.isolation_monitor import DEFAULT_INTERVAL_STEPS
from esper.slots.modes import beside_the_step, device_of, sole_device
from esper.slots.nested import to_device
from esper.slots.sharded import sharded_like
from esper.slots.slot import SeedSlot
from esper.training.control import RunControl
from esper.training.data_position import DataPosition
from esper.training.ema import EMA, check_average
from esper.training.governor import Governor, GovernorConfig
from esper.training.growth import Growth
from esper.training.held_out import Evaluate
from esper.training.optimizer_state import load_optimizer_state, optimizer_state
from esper.training.precision import MatmulPrecision, set_matmul_precision
from esper.training.run_cost import RunCost
from esper.training.safeguard import Safeguard, blamed, suspect, went_back

Positive = Annotated[FiniteFloat, Field(gt=0.0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class TrainerConfig(Record):
    """Settings of the loop."""

    epochs: AtLeastOne
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast dtype; float16 also scales gradients."""
    accumulation_steps: AtLeastOne = 1
    """Batches per optimizer step. A shorter last group still steps."""
    max_gradient_norm: Positive | None = None
    """Clips host and seeds each on their own; None does not clip."""
    decision_interval_steps: AtLeastOne | None = None
    """Optimizer steps between growth decisions; None decides after each epoch."""
    isolation_check_steps: AtLeastOne | None = DEFAULT_INTERVAL_STEPS
    """Optimizer steps between two checks that no gradient of an isolated seed reaches the host;
    None makes none."""
    governor: GovernorConfig = GovernorConfig()
    matmul_precision: MatmulPrecision = "highest"
    scheduler_interval: Literal["step", "epoch"] = "epoch"
    """When the learning-rate scheduler steps. ReduceLROnPlateau steps at neither: at each growth
    decision, by the held-out loss that was just evaluated."""
    cuda_graphs: bool = False
    """Whether forward and backward are replayed as CUDA graphs while nothing but values changes;
    see `esper.compilation.CapturedStep`."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One finished epoch."""

    epoch: int
    epochs: int
    step: int
    train_loss: float
    """Mean over the epoch's batches; NaN if every step was skipped."""
    metrics: dict[str, float]
    """As last evaluated."""
    cost: RunCost
    """Since the run began."""


@dataclass(frozen=True, kw_only=True)
class DecisionDue:
    """All is measured, and it is to be decided what grows; `Growth.state` tells by what."""

    metrics: dict[str, float]
    """As just evaluated."""


class Keeper(Protocol):
    """Looks at a trainer between two steps, as `Checkpoints` does."""

    def after_step(self, trainer: "Trainer") -> None:
        """Called after each optimizer step, and the decision that fell due with it."""

    def after_epoch(self, trainer: "Trainer") -> None:
        """Called after each epoch, when all of it is done."""

    def save(self, trainer: "Trainer") -> Path | None:
        """Keep the run now, between two steps; return where, or None if that is not possible."""


class _WentBack(Exception):  # noqa: N818 – no error, a way out of the epoch
    """The run has gone back to an earlier state."""


class Trainer:
    """Trains and grows a model.

    Args:
        growth: Slots, optimizer and policy.
        batches: Pairs of inputs and targets, iterated anew each epoch, and moved to the model's
            device if it has but one.
        loss: `(outputs, targets)` to a scalar.
        evaluate: As `Growth.after_epoch`.
        config: Settings of the loop.
        scheduler: Steps the learning rate; a ReduceLROnPlateau by the held-out loss, whenever that
            is evaluated.
        keeper: Keeps the run, as `Checkpoints` does; None keeps nothing.
        ema: Averages the weights after each step, and is kept with them.
        forward: Is called instead of the model: `DistributedDataParallel(model)`, made after
            attaching, where several processes train it; see docs/distributed.md.

    Effects: sets the process's matmul precision, and how often `growth` checks isolation.
    """

    def __init__(
        self,
        growth: Growth,
        batches: Iterable[tuple[Any, Any]],
        *,
        loss: Callable[[Any, Any], Tensor],
        evaluate: Evaluate,
        config: TrainerConfig,
        scheduler: Any | None = None,
        keeper: Keeper | None = None,
        ema: EMA | None = None,
        forward: nn.Module | None = None,
    ) -> None:
        check_average(ema, growth.slots)
        set_matmul_precision(config.matmul_precision)
        binding = growth.slots.binding
        if binding is None:
            raise ValueError("growth is not bound to an optimizer any more; make a new Growth")
        growth.isolation_monitor.interval_steps = config.isolation_check_steps
        self.growth = growth
        self.model = growth.slots.model
        self.config = config
        self.governor = Governor(config.governor)
        self._safeguard = Safeguard(config.governor)
        self._in_path: dict[str, nn.Module] = {}
        """Living seeds in the forward path after the last step, by slot."""
        self.epoch = 0
        """Epochs that are finished."""
        self.data = DataPosition(batches)
        """Where the run is in its data, and in the random streams."""
        self._loss = loss
        self._evaluate = evaluate
        self._scheduler = scheduler
        self.keeper = keeper
        self.control: RunControl | None = None
        """Carries out what somebody asks between two steps; None: nobody can."""
        self.ema = ema
        self.forward = self.model if forward is None else forward
        if isinstance(forward, nn.parallel.DistributedDataParallel):
            growth.slots.replicate(forward.process_group)
        self._optimizer = binding.optimizer
        self._device = device_of(self.model)
        self._input_device = sole_device(self.model)
        self._scaler = torch.amp.GradScaler(
            self._device.type, enabled=config.precision == "float16"
        )
        self._captured: CapturedStep | None = None
        if config.cuda_graphs:
            loss_of = functools.partial(self._forward, self.forward)
            self._captured = CapturedStep(
                growth.slots, loss_of, scale=self._scaler.scale, compiled=growth.compiled
            )
        self._metrics: dict[str, float] = {}
        self._losses: list[Tensor] = []
        """Of the steps of the epoch under way."""
        self._undecided: list[Tensor] = []
        """Of the steps since the last decision, which may lie in the epoch before."""

    def fit(self) -> list[EpochReport]:
        """Train for all epochs.

        Returns:
            One report per epoch.
        """
        return list(self.run())

    def run(self) -> Iterator[EpochReport]:
        """Train, yielding after each epoch, so that the caller can show progress.

        A trainer that was given a state goes on from it.

        Raises:
            RunStoppedError: Somebody has asked for it, by `control`.
            TrainingDivergedError: Going back did not help.
        """
        for stop in self.stops():
            if isinstance(stop, EpochReport):
                yield stop
            else:
                self.growth.conclude()

    def stops(self) -> Iterator[EpochReport | DecisionDue]:
        """Train, stopping at each decision and after each epoch, so that the caller can decide.

        At a `DecisionDue` the caller must call `growth.conclude(actions)` before it goes on; `run`
        lets the policy decide there, and is the same to the bit where the actions are.

        Raises:
            RuntimeError: The caller goes on without a decision.
            RunStoppedError: As `run`.
            TrainingDivergedError: The same.
        """
        while self.epoch < self.config.epochs:
            self.growth.meter.start()
            self._obey()
            with suppress(_WentBack):
                yield from self._train_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole run between two steps, model and optimizer included.

        Mappings, lists, plain values and tensors, which are copies.

        Raises:
            ValueError: The optimizer trains a parameter that is not the model's.
            RuntimeError: A seed's forward has raised, and `tick` has not pruned it yet.
        """
        model = self.model.state_dict()
        return {
            "model": {name: _copy(value) for name, value in model.items()},
            "growth": self.growth.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "governor": self.governor.state_dict(),
            "optimizer": optimizer_state(self._optimizer, self.model),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "data": self.data.state_dict(),
            "control": None if self.control is None else self.control.state_dict(),
            "epoch": self.epoch,
            "losses": [loss.clone() for loss in self._losses],
            "undecided": [loss.clone() for loss in self._undecided],
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, to the bit on a CPU.

        The trainer must be made as it was then: the same host, targets, optimizer, scheduler, data
        and settings. What has grown here since is gone, what had grown then is built again.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: Something is not as it was then; the message says what.
            BlueprintError: A blueprint is not registered here.

        Effects: random streams are put where they were when the next epoch begins.
        """
        if (state["ema"] is None) != (self.ema is None):
            had = "no average" if state["ema"] is None else "an average"
            raise ValueError(f"the run had {had} of its weights; make the trainer as it was then")
        if (state["scheduler"] is None) != (self._scheduler is None):
            had = "no" if state["scheduler"] is None else "a"
            raise ValueError(
                f"the run had {had} learning-rate scheduler; make the trainer as it was then"
            )
        self.growth.load_state_dict(state["growth"])
        here = self.model.state_dict()
        self.model.load_state_dict(
            {n: sharded_like(value, here.get(n, value)) for n, value in state["model"].items()}
        )
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        load_optimizer_state(self._optimizer, self.model, state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self.governor.load_state_dict(state["governor"])
        self.data.load_state_dict(state["data"])
        if self.control is not None and state["control"] is not None:
            self.control.load_state_dict(state["control"])
        self.epoch = state["epoch"]
        self._losses = [loss.to(self._device) for loss in state["losses"]]
        self._undecided = [loss.to(self._device) for loss in state["undecided"]]
        self._metrics = dict(state["metrics"])
        self._optimizer.zero_grad(set_to_none=True)
        self._in_path = self._seeds_in_path()

    def _train_epoch(self) -> Iterator[EpochReport | DecisionDue]:
        interval = self.config.decision_interval_steps
        self._keep_snapshot()
        for group in self._accumulation_groups():
            self.model.train()
            self._note(self._step(group))
            if self.governor.at_a_loss:
                self._intervene(group)
            if interval is not None and self.growth.step % interval == 0:
                yield from self._decide()
            self.settle()
            self._keep_snapshot()
            self._obey()
            if self.keeper is not None:
                self.keeper.after_step(self)
        if interval is None:
            yield from self._decide()
            self.settle()
        if self.config.scheduler_interval == "epoch":
            self._step_scheduler()
        train_loss = _mean(self._losses)
        self._losses = []
        self.epoch += 1
        self.growth.meter.stop()
        cost = self.growth.meter.cost
        measured = {"train_loss": train_loss}
        if cost.total.flops is not None:
            measured["flops"] = float(cost.total.flops)
        self.growth.measure(measured)
        if self.keeper is not None:
            self.keeper.after_epoch(self)
        yield EpochReport(
            epoch=self.epoch,
            epochs=self.config.epochs,
            step=self.growth.step,
            train_loss=train_loss,
            metrics=dict(self._metrics),
            cost=cost,
        )

    def _note(self, loss: Tensor | None) -> None:
        """Take note of a step's loss; None if it was refused."""
        if loss is not None:
            self._losses.append(loss)
            self._undecided.append(loss)
            self._safeguard.note_good_step()

    def _obey(self) -> None:
        if self.control is not None:
            self.control.between_steps(self)

    def save(self) -> Path | None:
        """Let the keeper keep the run now, between two steps; None if there is none, or it cannot.

        Raises:
            TypeError: As `Checkpoints.save`.
        """
        return None if self.keeper is None else self.keeper.save(self)

    def settle(self) -> None:
        """Let the governor forget what losses were with a seed that has left, or is on its way."""
        slots = self.growth.slots
        for path, branch in self._in_path.items():
            if slots[path].fading or all(branch is not other for other in slots[path].branches):
                self.governor.forget_losses()
        self._in_path = self._seeds_in_path()

    def _seeds_in_path(self) -> dict[str, nn.Module]:
        return {
            path: slot.living
            for path, slot in self.growth.slots.items()
            if slot.in_forward_path and slot.living is not None
        }

    def _keep_snapshot(self) -> None:
        if self.governor.bad_steps == 0 and self._safeguard.due(self.growth.step):
            self._safeguard.keep(self.state_dict())

    def _intervene(self, group: list[tuple[Any, Any]]) -> None:
        """Prune the seed that bad steps are the fault of, or go back to the last good state.

        Raises:
            _WentBack: The run has gone back, and the epoch begins anew from there.
            TrainingDivergedError: It has gone back too often.
        """
        governor, growth = self.governor, self.growth
        slot = suspect(growth.slots)
        if slot is not None:
            loss, without = self._losses_without(slot, group)
            bad_with = self._anywhere(bad=governor.is_bad(loss))
            if not self._anywhere(bad=governor.is_bad(without)) and bad_with:
                growth.publish([blamed(slot, loss=loss, without=without)])
                growth.publish(slot.prune(reason="steps are bad with it, and not without"))
                self._safeguard.mend_buffers(self.model)
                return
        found = self._safeguard.way_back(growth.step)
        if found is None:
            return
        state, same_batches = found
        growth.publish([went_back(state, from_step=growth.step, same_batches=same_batches)])
        if not same_batches:
            onward = {"data": self.data.state_dict(), "epoch": self.epoch}
            state = {**state, **onward, "losses": [], "undecided": []}
        self.load_state_dict(state)
        raise _WentBack

    def _losses_without(self, slot: SeedSlot, group: list[tuple[Any, Any]]) -> tuple[float, float]:
        """Return the step's loss, and what it would be without the slot's seed."""

        def total() -> float:
            batches = (to_device(batch, self._input_device) for batch in group)
            return sum(float(self._forward(self.model, x, y, len(group))) for x, y in batches)

        with beside_the_step(self.model), torch.no_grad():
            loss = total()
            with slot.left_out():
                return loss, total()

    def _decide(self) -> Iterator[DecisionDue]:
        train_loss = _mean(self._undecided)
        self._undecided = []
        self._metrics = self.growth.look(self._evaluate, train_loss=train_loss)
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(self._metrics["loss"])
        yield DecisionDue(metrics=dict(self._metrics))
        if self.growth.awaits_decision:
            raise RuntimeError(
                "nothing was decided; call growth.conclude(actions) at each DecisionDue, with [] "
                "to wait, or let the policy decide: for report in trainer.run()"
            )

    def _step_scheduler(self) -> None:
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()

    def _accumulation_groups(self) -> Iterator[list[tuple[Any, Any]]]:
        group: list[tuple[Any, Any]] = []
        for batch in self.data.epoch():
            group.append(batch)
            if len(group) == self.config.accumulation_steps:
                yield group
                group = []
        if group:
            yield group

    def _step(self, group: list[tuple[Any, Any]]) -> Tensor | None:
        """Make one optimizer step; None if the governor refused it."""
        total: Tensor | None = None
        for number, batch in enumerate(group, start=1):
            inputs, targets = to_device(batch, self._input_device)
            # Beside the step the model itself runs: a wrapper would wait for its gradients.
            beside = functools.partial(self._forward, self.model, inputs, targets, len(group))
            scaled = functools.partial(self._scaled, beside)
            if number == len(group):
                self.growth.check_isolation(scaled)
            with self.growth.meter.batch((inputs, targets)):
                self.growth.shadow_pass(scaled)
                last = number == len(group)
                total = self._passes(inputs, targets, len(group), total, look=last)
        self.growth.slots.average_gradients()
        norm = None
        if self.config.max_gradient_norm is not None:
            self._scaler.unscale_(self._optimizer)
            norm = self.growth.slots.clip_grad_norm_(self.config.max_gradient_norm)
        # With a GradScaler a non-finite gradient is its own affair: it skips and lowers the scale.
        refusal = self._refusal(None if self._scaler.is_enabled() else norm)
        if refusal is not None:
            self._optimizer.zero_grad(set_to_none=True)
            self.growth.publish([refusal])
            self._reset_scaler()
        else:
            with self.growth.meter.optimizer_step():
                self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
        self.growth.after_step()
        if self.ema is not None and refusal is None:
            self.ema.update()
        if self.config.scheduler_interval == "step":
            self._step_scheduler()
        return None if refusal is not None else total

    def _passes(
        self, inputs: Any, targets: Any, num_batches: int, total: Tensor | None, *, look: bool
    ) -> Tensor:
        """Make one batch's forward and backward.

        Args:
            inputs: Of the model.
            targets: Of the loss.
            num_batches: In the step.
            total: The loss of the step's batches so far.
            look: The governor takes a look at the loss of all of them.

        Returns:
            The loss of the step's batches with this one.
        """

        def see(loss: Tensor) -> None:
            nonlocal total
            total = loss if total is None else total + loss
            if look:  # before the backward, so that the loss is read meanwhile
                self.governor.look(total)

        if self._captured is None:
            loss = self._forward(self.forward, inputs, targets, num_batches)
            see(loss.detach())
            self._scaler.scale(loss).backward()
        else:
            self._captured(inputs, targets, num_batches, between=see)
            self.growth.publish(self._captured.take_events())
        assert total is not None
        return total

    def _refusal(self, norm: Tensor | None) -> StepSkipped | None:
        """Return why the optimizer must not step, in this process or, of several, in any."""
        refusal = self.governor.judge(norm)
        if refusal is None and self._anywhere(bad=False):
            refusal = StepSkipped(reason="the step is bad in another process", value=math.nan)
        elif refusal is not None:
            self._anywhere(bad=True)
        self.governor.count(refused=refusal is not None)
        return refusal

    def _anywhere(self, *, bad: bool) -> bool:
        """Return whether it is so here or in another process; all of them must ask."""
        replication = self.growth.slots.replication
        return bad if replication is None else replication.any(bad)

    def _forward(self, model: nn.Module, inputs: Any, targets: Any, num_batches: int) -> Tensor:
        """Return one batch's share of the step's loss."""
        with self._autocast():
            return self._loss(call_model(model, inputs), targets) / num_batches

    def _scaled(self, forward: Callable[[], Tensor]) -> Tensor:
        """Return the loss as the step's backward will see it."""
        return self._scaler.scale(forward())

    def _reset_scaler(self) -> None:
        if self._scaler.is_enabled() and self.config.max_gradient_norm is not None:
            self._scaler.update()

    def _autocast(self) -> torch.autocast:
        names = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
        dtype = names[self.config.precision]
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None)


def _mean(losses: list[Tensor]) -> float:
    """Return the mean loss of steps; NaN where there is none. Waits for the device."""
    return float(torch.stack(losses).mean()) if losses else math.nan


def _copy(value: Any) -> Any:
    """Return a copy of a tensor, and anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value
