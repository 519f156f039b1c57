"""Growth in the Trainer of Lightning."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.slots.slot_set import SlotSet
from esper.telemetry.sink import Sink
from esper.training.carried_state import CarriedState
from esper.training.ema import EMA, check_average
from esper.training.growth import Growth
from esper.training.growth_driver import GrowthDriver, build_again, check_loop
from esper.training.held_out import Evaluate
from esper.training.policy import Policy
from esper.training.random_states import random_states, set_random_states

_POSITION_PAIRED = ("WeightAveraging", "StochasticWeightAveraging")
"""Lightning's callbacks that average weights by position."""


class GrowthCallback(pl.Callback):
    """Grows a LightningModule, or a part of it, while Lightning trains it.

    Lightning's checkpoints hold what has grown, and `fit(…, ckpt_path=…)` goes on as if nothing had
    happened, where the callback is made as it was then. Held-out metrics are logged as
    "held_out/…" whenever a decision is made.

    Args:
        slots: From `esper.attach` to the LightningModule or a module in it, before `fit`.
        policy: Decides; see `esper.HeuristicPolicy`.
        evaluate: As `Growth.after_epoch`; `esper.HeldOut` for one.
        decision_interval_steps: Optimizer steps between growth decisions; None decides after each
            epoch's last step, before its validation.
        max_gradient_norm: Clips host and seeds each on their own. Leave `gradient_clip_val` of the
            Trainer out then.
        ema: Averages the weights after each step.
        sinks: Receive every event and metric.

    Attributes:
        growth: The engine, while it trains and afterwards; None before.

    Example: examples/lightning_digits.py
    """

    def __init__(
        self,
        slots: SlotSet,
        *,
        policy: Policy,
        evaluate: Evaluate,
        decision_interval_steps: int | None = None,
        max_gradient_norm: float | None = None,
        ema: EMA | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        check_average(ema, slots)
        self.slots = slots
        self.growth: Growth | None = None
        self.max_gradient_norm = max_gradient_norm
        self._policy = policy
        self._evaluate = evaluate
        self._interval = decision_interval_steps
        self._ema = ema
        self._sinks = sinks
        self._driver: GrowthDriver | None = None
        self._carried: CarriedState | None = None
        self._loaded: Mapping[str, Any] | None = None
        """From a checkpoint, until training begins."""
        self._global_step = 0
        self._loss: Tensor | None = None
        """Of the batches since the last optimizer step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the weights carry what has grown."""
        self._release()
        for callback in trainer.callbacks:
            if any(kind.__name__ in _POSITION_PAIRED for kind in type(callback).__mro__):
                check_average(callback, self.slots)
        self._carried = CarriedState(pl_module, state=self._state, load=self._load)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bind the optimizer, before its state is loaded.

        Raises:
            ValueError: Lightning trains in a way that growth does not know, or that seeds cannot
                stand; the message says how to do without.
        """
        optimizer, scheduler = _only_optimizer(trainer)
        check_loop(
            self.slots,
            joint_clipping=bool(trainer.gradient_clip_val),
            several=trainer.world_size > 1,
            scaled=str(trainer.precision).startswith("16"),
        )
        if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
            self.slots.replicate(trainer.model.process_group)
        elif trainer.world_size > 1:
            raise ValueError(
                f"{type(trainer.strategy).__name__} shards or wraps the model in a way that growth "
                'does not know; use strategy="ddp"'
            )
        growth = Growth(
            self.slots,
            optimizer,
            policy=self._policy,
            scheduler=scheduler,
            max_epochs=self._num_decisions(trainer),
            sinks=self._sinks,
        )
        self.growth = growth
        self._driver = GrowthDriver(
            growth,
            pl_module,
            evaluate=self._evaluate,
            decision_interval_steps=self._interval,
            ema=self._ema,
        )
        if self._loaded is not None:
            self._driver.load_state_dict(self._loaded)
            if self._loaded["random"] is not None:  # soon Lightning makes the data's iterator
                set_random_states(self._loaded["random"])
            self._loaded = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from here."""
        self._global_step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip gradients per owner, if asked to."""
        if self.max_gradient_norm is not None:
            self.slots.clip_grad_norm_(self.max_gradient_norm)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Let growth go on by a step; at an epoch's last one decide, before anything is saved."""
        assert self._driver is not None
        self._note_loss(outputs)
        steps = trainer.global_step - self._global_step
        if steps == 0:  # gradients accumulate
            return
        self._global_step = trainer.global_step
        if self._loss is not None:
            self._driver.note_loss(self._loss)
            self._loss = None
        for left in reversed(range(steps)):
            metrics = self._driver.after_step(epoch_ends=trainer.is_last_batch and left == 0)
            _log(pl_module, metrics)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide after an epoch whose last batch made no step."""
        assert self._driver is not None
        _log(pl_module, self._driver.after_epoch())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model's state dict and the optimizer alone again."""
        self._release()

    def _release(self) -> None:
        if self._carried is not None:
            self._carried.remove()
        if self._driver is not None:
            self.slots.unbind()
        self._carried = self._driver = self._loaded = self._loss = None

    def _note_loss(self, outputs: Any) -> None:
        """Add a batch's share of the step's loss, if the LightningModule tells it."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def _num_decisions(self, trainer: pl.Trainer) -> int | None:
        """Return how many decisions will come, if that is known."""
        if self._interval is None:
            epochs = trainer.max_epochs
            return None if epochs is None or epochs < 0 else epochs
        steps = trainer.estimated_stepping_batches
        return int(steps) // self._interval if math.isfinite(steps) else None

    def _state(self) -> Mapping[str, Any] | None:
        if self._driver is None:
            return None
        alone = self.slots.replication is None
        return {**self._driver.state_dict(), "random": random_states() if alone else None}

    def _load(self, state: Mapping[str, Any]) -> None:
        build_again(self.slots, state)
        self._loaded = state


def _log(module: pl.LightningModule, metrics: Mapping[str, float] | None) -> None:
    """Log the held-out metrics of a decision, if one was made."""
    if metrics is not None:
        named = {f"held_out/{name}": value for name, value in metrics.items()}
        module.log_dict(named, on_step=False, on_epoch=True, batch_size=1)


def _only_optimizer(trainer: pl.Trainer) -> tuple[Optimizer, Any]:
    """Return the optimizer, and its learning-rate scheduler if there is one.

    Raises:
        ValueError: There are several.
    """
    optimizers, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
    if len(optimizers) != 1 or len(schedulers) > 1:
        raise ValueError(
            f"growth takes one optimizer and at most one learning-rate scheduler, and "
            f"configure_optimizers returned {len(optimizers)} and {len(schedulers)}; torch's "
            "SequentialLR and ChainedScheduler make one scheduler of several"
        )
    return optimizers[0], schedulers[0].scheduler if schedulers else None
