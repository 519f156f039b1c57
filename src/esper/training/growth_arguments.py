"""What a Growth and its trainer are made of, checked before anything is changed."""

import math
from collections.abc import Iterable
from numbers import Integral
from operator import length_hint
from typing import Any

from torch.optim import Optimizer

from esper.slots.slot_set import SlotSet
from esper.training.trainer_config import TrainerConfig


def check_arguments(
    slots: object, optimizer: Optimizer, *, scheduler: Any, max_epochs: object, sinks: object
) -> None:
    """Raise unless these are what `Growth` takes.

    Raises:
        TypeError: One is of another kind; the message says of which, and what it should be.
        ValueError: There would be fewer than no decisions, or the scheduler is of another
            optimizer.
    """
    if not isinstance(slots, SlotSet):
        raise TypeError(
            f"Growth takes the slots that esper.attach returned, got {type(slots).__name__}"
        )
    if not isinstance(sinks, Iterable):
        raise TypeError(
            f"sinks must be a list of sinks, got {type(sinks).__name__}; pass sinks=[…] for one"
        )
    if max_epochs is not None and not isinstance(max_epochs, Integral):
        raise TypeError(f"max_epochs must be a whole number of decisions, got {max_epochs!r}")
    if isinstance(max_epochs, Integral) and max_epochs < 0:
        raise ValueError(f"max_epochs must be at least 0, got {max_epochs}")
    check_scheduler(scheduler, optimizer)


def check_scheduler(scheduler: Any, optimizer: Optimizer) -> None:
    """Raise unless a learning-rate scheduler is one of this optimizer, as far as it can tell.

    Raises:
        TypeError: It has no `step`.
        ValueError: Its optimizer has none of this one's parameter groups.
    """
    if scheduler is None:
        return
    if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            "scheduler must be a learning-rate scheduler of the optimizer, as "
            f"torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, …), got {scheduler!r}"
        )
    other = getattr(scheduler, "optimizer", None)
    if isinstance(other, Optimizer):  # a wrapper of an optimizer has its groups
        groups = {id(group) for group in optimizer.param_groups}
        if groups.isdisjoint(id(group) for group in other.param_groups):
            raise ValueError(
                f"the {type(scheduler).__name__} is of another optimizer than the "
                f"{type(optimizer).__name__} that trains, and would change no learning rate of it; "
                "make it of that one"
            )


def check_scheduler_interval(
    scheduler: Any, config: TrainerConfig, batches: Iterable[object]
) -> None:
    """Raise if a scheduler is planned for the steps of a run, and would step once in an epoch.

    Raises:
        ValueError: Its `total_steps` are just those of the run.
    """
    planned, num_batches = getattr(scheduler, "total_steps", None), length_hint(batches)
    steps = {config.epochs * math.ceil(num_batches / n) for n in (1, config.accumulation_steps)}
    if config.scheduler_interval == "epoch" and planned in steps and planned > config.epochs:
        raise ValueError(
            f"the {type(scheduler).__name__} is planned for {planned} steps, those of the run, and "
            f"would step once in each of {config.epochs} epochs; pass "
            'TrainerConfig(…, scheduler_interval="step")'
        )
