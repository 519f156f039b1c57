"""Growth in the Trainer of transformers."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from esper.training.carried_state import CarriedState
from esper.training.ema import EMA
from esper.training.end_of_training import warn_of_living
from esper.training.growth import Growth
from esper.training.growth_driver import GrowthDriver, check_loop
from esper.training.held_out import Evaluate


class GrowthCallback(TrainerCallback):
    """Grows the model of a transformers Trainer while it trains.

    Checkpoints of the Trainer hold what has grown, and `train(resume_from_checkpoint=…)` goes on as
    if nothing had happened, where the callback is made as it was then: from now on the model's
    state dict carries what has grown.

    Args:
        growth: Slots of the Trainer's model and its optimizer, made before training begins:
            `esper.Growth(slots, trainer.create_optimizer(), policy=…)`. Schedulers come later.
        evaluate: As `Growth.after_epoch`; `esper.HeldOut` for one.
        decision_interval_steps: Optimizer steps between growth decisions; None decides after each
            epoch.
        max_gradient_norm: Clips host and seeds each on their own. Turn the Trainer's own clipping
            off then: `TrainingArguments(max_grad_norm=0)`.
        ema: Averages the weights after each step.

    Raises:
        TypeError: The average pairs weights by position, or `growth` is something else.

    Example: examples/huggingface_trainer.py
    """

    def __init__(
        self,
        growth: Growth,
        *,
        evaluate: Evaluate,
        decision_interval_steps: int | None = None,
        max_gradient_norm: float | None = None,
        ema: EMA | None = None,
    ) -> None:
        if not isinstance(growth, Growth):
            raise TypeError(
                "GrowthCallback takes esper.Growth(slots, trainer.create_optimizer(), policy=…), "
                f"got {type(growth).__name__}"
            )
        self.growth = growth
        self.max_gradient_norm = max_gradient_norm
        model = growth.slots.model
        self._driver = GrowthDriver(
            growth,
            model,
            evaluate=evaluate,
            decision_interval_steps=decision_interval_steps,
            ema=ema,
        )
        self._decision_interval_steps = decision_interval_steps
        self._plans_itself = growth.max_epochs is not None
        CarriedState(model, state=self._state, load=self._load)
        growth.slots.keep_out_of_wrappers()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the Trainer trains what grows, and in a way that seeds can stand.

        Raises:
            ValueError: It does not; the message says how to make it so.
        """
        slots = self.growth.slots
        if kwargs["model"] is not slots.model:
            raise ValueError(
                f"the slots are in a {type(slots.model).__name__}, and the Trainer trains another "
                f"model, a {type(kwargs['model']).__name__}; attach to the Trainer's model itself, "
                "without model_init, and before FSDP or DeepSpeed wrap anything"
            )
        bound = None if slots.binding is None else slots.binding.optimizer
        optimizer = _innermost(kwargs["optimizer"])
        if optimizer is not bound:
            raise ValueError(
                f"growth is bound to another optimizer than the Trainer's "
                f"{type(optimizer).__name__}, which would never train a seed; use its own: "
                "esper.Growth(slots, trainer.create_optimizer(), …), or give yours to the Trainer: "
                "Trainer(…, optimizers=(optimizer, None))"
            )
        sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        if sharded or getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                f"growth does not know {sharded[0] if sharded else 'deepspeed'}, which shards what "
                "it was given before; train with DDP, one process per GPU"
            )
        if hasattr(slots.model, "peft_config") and args.save_strategy != "no":
            raise ValueError(
                f"the Trainer's checkpoints of a {type(slots.model).__name__} hold PEFT's adapters "
                'alone, and nothing of what grows; set save_strategy="no" and save with '
                "esper.save_pretrained, or train with esper.Trainer and Checkpoints"
            )
        several = args.parallel_mode is ParallelMode.DISTRIBUTED
        if args.parallel_mode not in (ParallelMode.DISTRIBUTED, ParallelMode.NOT_PARALLEL):
            raise ValueError(
                f"the Trainer would train by {args.parallel_mode.value}, which growth does not "
                "know; start one process per GPU with torchrun"
            )
        check_loop(slots, joint_clipping=args.max_grad_norm > 0, several=several, scaled=args.fp16)
        if several and slots.replication is None:
            slots.replicate()
        if not self._plans_itself:
            left = self._num_decisions_left(state)
            self.growth.max_epochs = None if left is None else self.growth.epoch + left

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip gradients per owner, if asked to."""
        if self.max_gradient_norm is not None:
            _unscale(kwargs["optimizer"])
            self.growth.slots.clip_grad_norm_(self.max_gradient_norm, only_bound=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let growth go on by a step; at an epoch's last one decide, before anything is saved."""
        self._driver.after_step()
        self._driver.decide(epoch_ends=float(state.epoch).is_integer())

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide after an epoch of a data set that did not tell its length."""
        self._driver.decide(epoch_ends=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune seeds that raised in the Trainer's evaluation, before anything is saved."""
        self._driver.after_validation()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of the training loss, for policies that decide by it."""
        logs: Mapping[str, float] = kwargs["logs"]
        if "loss" in logs:
            self._driver.note_loss(logs["loss"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of seeds of which nothing is decided."""
        if state.is_world_process_zero:
            warn_of_living(self.growth.slots)

    def _num_decisions_left(self, state: TrainerState) -> int | None:
        """Return how many decisions the Trainer's run has from here on, if that is known."""
        every = self._decision_interval_steps
        if every is not None:
            return int(state.max_steps // every - state.global_step // every)
        epochs = int(state.num_train_epochs)
        if epochs == sys.maxsize:  # of data without a length
            return None
        return math.ceil(epochs - (state.epoch or 0.0))

    def _state(self) -> Mapping[str, Any] | None:
        bound = self.growth.slots.binding is not None
        return self._driver.state_dict() if bound else None

    def _load(self, state: Mapping[str, Any]) -> None:
        self._driver.load_state_dict(state)
        self.growth.slots.keep_out_of_wrappers()


def _unscale(optimizer: Any) -> None:
    """Give gradients of float16 their own size, if the Trainer has not done so."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return
    try:
        scaler.unscale_(_innermost(optimizer))
    except RuntimeError as error:  # later releases do it at each step, to log the norm
        if "already been called" not in str(error):
            raise


def _innermost(optimizer: Any) -> Any:
    """Return the optimizer inside those that only wrap it, as accelerate's does."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
