"""Growth in the Trainer of Lightning."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esper.slots.slot_set import SlotSet
from esper.telemetry.sink import Sink
from esper.training.carried_state import CarriedState
from esper.training.ema import EMA, check_average
from esper.training.end_of_training import warn_of_living
from esper.training.growth import Growth
from esper.training.growth_driver import GrowthDriver, check_loop
from esper.training.held_out import Evaluate
from esper.training.policy import Policy
from esper.training.random_states import random_states, set_random_states

_POSITION_PAIRED = ("WeightAveraging", "StochasticWeightAveraging")
"""Lightning's callbacks that average weights by position."""


class GrowthCallback(pl.Callback):
    """Grows a LightningModule, or a part of it, while Lightning trains it.

    Lightning's checkpoints hold what has grown, and `fit(…, ckpt_path=…)` goes on as if nothing had
    happened, where the callback is made as it was then. Held-out metrics are logged as
    "held_out/…", the mean over an epoch's decisions.

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
        self._module: pl.LightningModule | None = None
        self._others: list[nn.Parameter] = []
        """The LightningModule's parameters outside of the slots' model."""
        self._handle: RemovableHandle | None = None
        """Of the hook that counts the optimizer's steps."""
        self._stepped = False
        self._loaded: Mapping[str, Any] | None = None
        """From a checkpoint, until training begins."""
        self._losses: list[Tensor] = []
        """Of the batches since the last optimizer step, as Lightning divides them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the weights carry what has grown, from now on."""
        for callback in trainer.callbacks:
            if any(kind.__name__ in _POSITION_PAIRED for kind in type(callback).__mro__):
                check_average(callback, self.slots)
        self._loaded = None
        self._module = pl_module
        CarriedState(pl_module, state=self._state, load=self._load)
        self.slots.keep_out_of_wrappers(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bind the optimizer, before its state is loaded. A further `fit` goes on growing.

        Raises:
            ValueError: Lightning trains in a way that growth does not know, or that seeds cannot
                stand; the message says how to do without.
        """
        optimizer, scheduler = _only_optimizer(trainer)
        scaled = str(trainer.precision).startswith("16")
        several = trainer.world_size > 1
        clips = bool(trainer.gradient_clip_val)
        check_loop(self.slots, joint_clipping=clips, several=several, scaled=scaled)
        unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
        if scaled and unscales and self.max_gradient_norm is not None:
            raise ValueError(
                f"this {type(optimizer).__name__} takes scaled gradients and cannot be clipped "
                "with float16; make it with fused=False"
            )
        if several and not isinstance(trainer.model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{type(trainer.strategy).__name__} shards or wraps the model in a way that growth "
                'does not know; use strategy="ddp"'
            )
        if several:
            self.slots.replicate(trainer.model.process_group)
        self._release()
        if self.growth is None:
            self.growth = Growth(
                self.slots,
                optimizer,
                policy=self._policy,
                scheduler=scheduler,
                sinks=self._sinks,
            )
        else:
            self.slots.bind(optimizer, scheduler)
        total, done = self._num_decisions(trainer)
        resumes = self._loaded is not None  # then its epochs are those of this run
        before = 0 if resumes else self.growth.epoch - done
        self.growth.max_epochs = None if total is None else before + total
        self._driver = GrowthDriver(
            self.growth,
            pl_module,
            evaluate=self._evaluate,
            decision_interval_steps=self._interval,
            ema=self._ema,
        )
        inside = set(self.slots.model.parameters())
        self._others = [p for p in pl_module.parameters() if p not in inside]
        if self._loaded is not None:
            self._driver.load_state_dict(self._loaded)
            if self._loaded["random"] is not None:  # soon Lightning makes the data's iterator
                set_random_states(self._loaded["random"])
            self._loaded = None
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip gradients per owner, if asked to."""
        if self.max_gradient_norm is not None:
            self.slots.clip_grad_norm_(self.max_gradient_norm, others=self._others, only_bound=True)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Decide after an epoch's last step, or every N steps, before anything is saved."""
        assert self._driver is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if self._stepped:
            self._stepped = False
            if self._losses:
                mean = torch.stack(self._losses).mean() * trainer.accumulate_grad_batches
                self._driver.note_loss(mean, num_batches=len(self._losses))
                self._losses = []
            self._decide(pl_module, epoch_ends=trainer.is_last_batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide after an epoch whose last batch made no step."""
        self._decide(pl_module, epoch_ends=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune seeds that raised in validation, before anything is saved."""
        if self._driver is not None:
            self._driver.after_validation()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of seeds of which nothing is decided."""
        if trainer.is_global_zero:
            warn_of_living(self.slots)

    def _after_step(self, *_: Any) -> None:
        assert self._driver is not None
        self._stepped = True
        self._driver.after_step()

    def _decide(self, pl_module: pl.LightningModule, *, epoch_ends: bool) -> None:
        assert self._driver is not None
        metrics = self._driver.decide(epoch_ends=epoch_ends)
        if metrics is not None:
            named = {f"held_out/{name}": value for name, value in metrics.items()}
            pl_module.log_dict(named, on_step=False, on_epoch=True, batch_size=1)

    def _release(self) -> None:
        """Let go of the optimizer of an earlier fit."""
        if self._handle is not None:
            self._handle.remove()
        self.slots.unbind()
        self._driver = self._handle = None
        self._losses, self._stepped = [], False

    def _num_decisions(self, trainer: pl.Trainer) -> tuple[int | None, int]:
        """Return how many decisions the Trainer's run has, if that is known, and had already."""
        if self._interval is None:
            return _num_epochs(trainer), trainer.current_epoch
        steps = trainer.estimated_stepping_batches  # -1 where the data has no length
        total = int(steps) // self._interval if 0 <= steps < math.inf else None
        return total, trainer.global_step // self._interval

    def _state(self) -> Mapping[str, Any] | None:
        if self._driver is None or self.slots.binding is None:  # before or after training
            return None
        alone = self.slots.replication is None
        return {**self._driver.state_dict(), "random": random_states() if alone else None}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.slots.restore(state["growth"]["slots"]["slots"])
        self.slots.keep_out_of_wrappers(self._module)
        self._loaded = state


def _num_epochs(trainer: pl.Trainer) -> int | None:
    """Return how many epochs the Trainer's run has, the last one begun at least, if it is known."""
    ends: list[int] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs)
    if trainer.max_steps >= 0:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        num_batches = trainer.num_training_batches
        if 0 < num_batches < math.inf:
            steps_per_epoch = math.ceil(num_batches / trainer.accumulate_grad_batches)
            left = math.ceil((trainer.max_steps - trainer.global_step) / steps_per_epoch)
            ends.append(trainer.current_epoch + left)
    return min(ends, default=None)


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
