"""The training loop, growth included."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from esper.slots.modes import device_of
from esper.slots.state_fields import check_slot_states
from esper.training.control import RunControl
from esper.training.data_position import DataPosition
from esper.training.ema import EMA, check_average
from esper.training.end_of_training import warn_of_living, warn_of_no_epochs_left
from esper.training.governor import Governor
from esper.training.growth import Growth
from esper.training.growth_arguments import check_scheduler, check_scheduler_interval
from esper.training.held_out import Evaluate, check_pair
from esper.training.model_state import check_model_state, load_model_state, model_state
from esper.training.optimizer_state import (
    check_optimizer_state,
    load_optimizer_state,
    optimizer_state,
)
from esper.training.precision import set_matmul_precision
from esper.training.run_cost import RunCost
from esper.training.safeguard import Safeguard, TrainingDivergedError, suspects, went_back
from esper.training.scheduler_state import (
    check_scheduler_state,
    load_scheduler_state,
    scheduler_state,
)
from esper.training.step_losses import StepLosses
from esper.training.trainer_config import TrainerConfig
from esper.training.trainer_state import check_trainer_state
from esper.training.training_step import Batch, TrainingStep


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One finished epoch."""

    epoch: int
    epochs: int
    step: int
    train_loss: float
    """Mean over the epoch's batches, those of skipped steps left out; NaN if all were."""
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
            attaching, compiled or not, where several processes train it; docs/distributed.md.

    Raises:
        TypeError: `growth` or `scheduler` is something else.
        ValueError: `growth` is not bound any more, the scheduler is another optimizer's or
            planned for steps where it steps by epochs, or several processes run and nothing in
            `forward` makes one model of theirs.

    Effects: sets the process's matmul precision, and how often `growth` checks isolation.
    """

    def __init__(
        self,
        growth: Growth,
        batches: Iterable[Batch],
        *,
        loss: Callable[[Any, Any], Tensor],
        evaluate: Evaluate,
        config: TrainerConfig,
        scheduler: Any | None = None,
        keeper: Keeper | None = None,
        ema: EMA | None = None,
        forward: nn.Module | None = None,
    ) -> None:
        if not isinstance(growth, Growth):
            raise TypeError(
                "Trainer takes the growth that esper.Growth(slots, optimizer, policy=…) makes, got "
                f"{type(growth).__name__}"
            )
        check_average(ema, growth.slots)
        set_matmul_precision(config.matmul_precision)
        binding = growth.slots.binding
        if binding is None:
            raise ValueError("growth is not bound to an optimizer any more; make a new Growth")
        check_scheduler(scheduler, binding.optimizer)
        check_scheduler_interval(scheduler, config, batches)
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
        self._evaluate = evaluate
        self._scheduler = scheduler
        self.keeper = keeper
        self.control: RunControl | None = None
        """Carries out what somebody asks between two steps; None: nobody can."""
        self.ema = ema
        self._optimizer = binding.optimizer
        self.training_step = TrainingStep(
            growth,
            self.governor,
            loss=loss,
            forward=self.model if forward is None else forward,
            precision=config.precision,
            max_gradient_norm=config.max_gradient_norm,
            cuda_graphs=config.cuda_graphs,
        )
        self._metrics: dict[str, float] = {}
        self._losses = StepLosses()
        """Of the steps of the epoch under way."""
        self._undecided = StepLosses()
        """Of the steps since the last decision, which may lie in the epoch before."""

    def fit(self) -> list[EpochReport]:
        """Train for all epochs.

        Returns:
            One report per epoch that was trained.

        Effects: warns of seeds that still live at the end, and if there was nothing left to train.
        """
        if self.epoch >= self.config.epochs:
            warn_of_no_epochs_left(self.config.epochs)
            return []
        reports = list(self.run())
        warn_of_living(self.growth.slots)
        return reports

    def run(self) -> Iterator[EpochReport]:
        """Train, yielding after each epoch, so that the caller can show progress.

        A trainer that was given a state goes on from it.

        Raises:
            RunStoppedError: Somebody has asked for it, by `control`.
            TrainingDivergedError: Going back did not help, or no step of an epoch could be made,
                up to a decision or its end.
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
        if self.growth.awaits_decision:  # whoever was to decide has been interrupted
            self.growth.conclude([])
        self.growth.sink_guard.begin()
        try:
            while self.epoch < self.config.epochs:
                if self.growth.slots.replication is not None:  # the caller may have evaluated
                    self.prune_failed()
                self.growth.meter.start()
                self._obey()
                with suppress(_WentBack):
                    yield from self._train_epoch()
        finally:
            self.growth.meter.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole run between two steps, model and optimizer included.

        Mappings, lists, plain values and tensors, which are copies.

        Raises:
            ValueError: The optimizer trains a parameter that is not the model's.
            RuntimeError: Of several processes, a seed has raised in this one; call `prune_failed`
                in all of them first.

        Effects: as `prune_failed`, in a single process.
        """
        if self.growth.slots.replication is None:
            self.prune_failed()
        return {
            "model": model_state(self.model),
            "growth": self.growth.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "governor": self.governor.state_dict(),
            "optimizer": optimizer_state(self._optimizer, self.model),
            "scheduler": scheduler_state(self._scheduler),
            "scaler": self.training_step.scaler.state_dict(),
            "data": self.data.state_dict(),
            "control": None if self.control is None else self.control.state_dict(),
            "epoch": self.epoch,
            "losses": self._losses.state_dict(),
            "undecided": self._undecided.state_dict(),
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, to the bit on a CPU.

        The trainer must be made as it was then: the same host, targets, optimizer, scheduler, data
        and settings. What has grown here since is gone, what had grown then is built again.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: Something is not as it was then, or a field is missing; the message says
                what.
            BlueprintError: A blueprint is not registered here.

        Effects: random streams are put where they were when the next epoch begins.
        """
        self._check_made_as(state)
        self._become(state)
        self._safeguard = Safeguard(self.config.governor)  # what it holds led to another state

    def _become(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of this trainer, or of one that was made as it is."""
        self.growth.load_state_dict(state["growth"])
        load_model_state(self.model, state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        load_optimizer_state(self._optimizer, self.model, state["optimizer"])
        load_scheduler_state(self._scheduler, state["scheduler"])
        self.training_step.scaler.load_state_dict(state["scaler"])
        self.governor.load_state_dict(state["governor"])
        self.data.load_state_dict(state["data"])
        if self.control is not None and state["control"] is not None:
            self.control.load_state_dict(state["control"])
        self.epoch = state["epoch"]
        device = device_of(self.model)
        self._losses.load_state_dict(state["losses"], device=device)
        self._undecided.load_state_dict(state["undecided"], device=device)
        self._metrics = dict(state["metrics"])
        self.training_step.drop_gradients()
        self._in_path = self._seeds_in_path()

    def _check_made_as(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a trainer's state is whole and fits this one, growth left out."""
        losses = {"losses": self._losses, "undecided": self._undecided}
        check_trainer_state(state, {"governor": self.governor, "data": self.data, **losses})
        again = "make the trainer as it was then"
        check_slot_states(state["growth"]["slots"]["slots"], list(self.growth.slots))
        if (state["ema"] is None) != (self.ema is None):
            had = "no average" if state["ema"] is None else "an average"
            raise ValueError(f"the run had {had} of its weights; {again}")
        check_scheduler_state(self._scheduler, state["scheduler"])
        if not state["scaler"] and self.training_step.scaler.enabled:
            raise ValueError(f"the run had another precision than float16; {again}")
        check_optimizer_state(self._optimizer, state["optimizer"])
        check_model_state(self.model, state["model"])

    def prune_failed(self) -> None:
        """Prune seeds that raised since the last step, which no state between steps can hold.

        Of several processes all must call it.
        """
        self.growth.prune_failed()
        self.settle()

    def _train_epoch(self) -> Iterator[EpochReport | DecisionDue]:
        interval = self.config.decision_interval_steps
        if self.data.begins_epoch:
            self._forget_interrupted()
        self._keep_snapshot()
        for group in self._accumulation_groups():
            self.model.train()
            self._make_step(group)
            if self.governor.at_a_loss:
                self._intervene(group)
            if interval is not None and self.growth.step % interval == 0:
                self._check_progress()
                yield from self._decide()
            self.settle()
            self._keep_snapshot()
            self._obey()
            if self.keeper is not None:
                self.keeper.after_step(self)
        self._check_progress()
        if interval is None:
            yield from self._decide()
            self.settle()
        if self.config.scheduler_interval == "epoch":
            self._step_scheduler()
        train_loss = self._losses.mean()
        self._losses.clear()
        self.data.end_epoch()
        self.epoch += 1
        self.growth.meter.stop()
        cost = self.growth.meter.cost
        measured = {"train_loss": train_loss}
        spent = self.growth.spent(cost)
        if spent.flops is not None:
            measured["flops"] = float(spent.flops)
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

    def _make_step(self, group: list[Batch]) -> None:
        """Make one optimizer step, and let all that counts steps take note of it."""
        loss = self.training_step.make(group)
        self.growth.after_step()
        if loss is not None:
            if self.ema is not None:
                self.ema.update()
            self._losses.add(loss, num_batches=len(group))
            self._undecided.add(loss, num_batches=len(group))
            self._safeguard.note_good_step()
        if self.config.scheduler_interval == "step":
            self._step_scheduler()

    def _forget_interrupted(self) -> None:
        """Forget the losses of an epoch that was interrupted, and is trained anew."""
        self._losses = StepLosses()
        if self.config.decision_interval_steps is None:
            self._undecided = StepLosses()

    def _check_progress(self) -> None:
        """Raise TrainingDivergedError if no step of the epoch was made, the last of them bad."""
        skipped = self.governor.last_skipped
        if self.governor.at_a_loss and skipped is not None and not self._losses:
            raise TrainingDivergedError(
                f"no step of epoch {self.epoch + 1} could be made, the last one because "
                f"{skipped.reason}; look at the data and the loss, or lower the learning rate"
            )

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

    def _intervene(self, group: list[Batch]) -> None:
        """Prune the seed that bad steps are the fault of, or go back to the last good state.

        Raises:
            _WentBack: The run has gone back, and the epoch begins anew from there.
            TrainingDivergedError: It has gone back too often.
        """
        growth = self.growth
        event = self.training_step.blame(suspects(growth.slots), group)
        if event is not None:
            growth.publish([event])
            reason = "steps are bad with it, and not without"
            growth.publish(growth.slots[event.slot].prune(reason=reason))
            self.governor.begin_anew()
            return
        found = self._safeguard.way_back(growth.step)
        if found is None:
            return
        state, same_batches = found
        growth.publish([went_back(state, from_step=growth.step, same_batches=same_batches)])
        # What is thrown away was paid for.
        spent = {"meter": growth.meter.state_dict()}
        state = {**state, "growth": {**state["growth"], **spent}}
        if not same_batches:
            onward = {"data": self.data.state_dict(), "epoch": self.epoch}
            none = StepLosses().state_dict()
            state = {**state, **onward, "losses": none, "undecided": none}
        self._become(state)
        raise _WentBack

    def _decide(self) -> Iterator[DecisionDue]:
        train_loss = self._undecided.mean()
        self._metrics = self.growth.look(self._evaluate, train_loss=train_loss)
        self._undecided.clear()
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

    def _accumulation_groups(self) -> Iterator[list[Batch]]:
        group: list[Batch] = []
        for batch in self.data.epoch(self.epoch):
            check_pair(batch, of="training batches")
            group.append(batch)
            if len(group) == self.config.accumulation_steps:
                yield group
                group = []
        if group:
            yield group
