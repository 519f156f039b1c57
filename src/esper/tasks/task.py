"""What a task is: a host, its data, and settings known to work."""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from esper.policies.growth_schedule import GrowthScheduleConfig
from esper.policies.heuristic import HeuristicConfig, HeuristicPolicy
from esper.slots.config import SlotConfig
from esper.training.held_out import HeldOut


class TaskDataError(ValueError):
    """A task's data cannot be found, read or used; the message says why and what to do."""


class Batches(Iterable[tuple[Any, Any]], Sized, Protocol):
    """Pairs of inputs and targets; iterating again is the next epoch, the length is fixed.

    What they draw by must be found by a checkpoint: the global random streams, an attribute
    `generator`, or `state_dict` and `load_state_dict`.
    """


@dataclass(frozen=True, kw_only=True)
class TaskSetup:
    """One randomly initialised host with its data.

    Attributes:
        targets: Where slots go.
        validation: What gates and policy judge by.
        selection: What settings of finished runs are chosen by, where `validation` is only a part
            of what there is, since every decision evaluates it; None takes `validation`.
        test: Touched by neither training nor growth; for the final figures only.
        notes: What a person should know of the data, as that a part of it was left out.
    """

    model: nn.Module
    targets: Sequence[str]
    example: Any
    batches: Batches
    loss: Callable[[Any, Any], Tensor]
    validation: HeldOut
    test: HeldOut
    selection: HeldOut | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named task.

    Attributes:
        build: Random seed to setup; the same seed gives the same host and data order.
        metric: Name of the metric that people quote, among those of the held-out data.
        policy: The one that decides where none is named.
        warmup_fraction: Share of a run in which the learning rate rises.
        max_gradient_norm: Gradients are clipped to it, the host's and each seed's; None clips none.
        threads: CPU threads that suit the host; None leaves torch's choice.
    """

    name: str
    summary: str
    build: Callable[[int], TaskSetup]
    metric: str
    epochs: int
    learning_rate: float
    slot: SlotConfig
    heuristic: HeuristicConfig
    growth_schedule: GrowthScheduleConfig
    policy: str = HeuristicPolicy.name
    warmup_fraction: float = 0.0
    max_gradient_norm: float | None = None
    threads: int | None = None
