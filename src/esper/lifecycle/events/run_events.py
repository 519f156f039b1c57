"""What can happen to a run, and to what runs beside it: checkpoints, compiling, the bus, sinks."""

from typing import Literal

from esper.lifecycle.actions import Action
from esper.lifecycle.commands import Command
from esper.lifecycle.events.base import BaseEvent, Priority
from esper.lifecycle.words import action_words, command_words


class RunStarted(BaseEvent):
    """A run began."""

    type: Literal["run_started"] = "run_started"
    slots: tuple[str, ...]
    host_param_count: int


class RunFinished(BaseEvent):
    """A run came to its end."""

    type: Literal["run_finished"] = "run_finished"
    metrics: dict[str, float]
    param_count: int


class RunFailed(BaseEvent):
    """An error has ended a run."""

    type: Literal["run_failed"] = "run_failed"
    error: str
    """What it says, after its kind."""

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return f"the run ended: {self.error}"


class TwinFinished(BaseEvent):
    """The twin of a finished run, which never grew, came to its end with as many operations."""

    type: Literal["twin_finished"] = "twin_finished"
    metrics: dict[str, float]
    param_count: int
    epochs: int
    shared_steps: int
    """For how many steps both are the same run."""
    flops_fraction: float
    """Operations of the twin, as a share of the run's."""


class RewardGiven(BaseEvent):
    """What came of a decision was weighed, for somebody who learns to decide."""

    type: Literal["reward_given"] = "reward_given"
    components: dict[str, float]
    """By name; see docs/policies.md."""
    total: float
    """Their sum."""


class EnvironmentRestarted(BaseEvent):
    """A process that let a host train for a policy to learn by has ended, and was started again."""

    type: Literal["environment_restarted"] = "environment_restarted"
    reason: str
    """Which one, and why."""
    num_restarts: int
    """Of all so far, this one included, since this process began or went on with the training."""

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"an environment was started again, restart {self.num_restarts}: {self.reason}"


class StepSkipped(BaseEvent):
    """The governor, or with float16 the loss scaler, kept a bad step from the optimizer."""

    type: Literal["step_skipped"] = "step_skipped"
    reason: str
    value: float
    loss_scale: float | None = None
    """At which a gradient was not finite, and which is lowered therefore; None: the governor's."""

    @property
    def of_search(self) -> bool:
        """Whether the loss scaler only looks for a scale; below 1 it has looked far enough."""
        return self.loss_scale is not None and self.loss_scale >= 1.0

    @property
    def priority(self) -> Priority:
        return Priority.NORMAL if self.of_search else Priority.CRITICAL

    def __str__(self) -> str:
        return f"step skipped: {self.reason}"


class RunWentBack(BaseEvent):
    """Steps in a row were bad, and the run goes on from its last good state."""

    type: Literal["run_went_back"] = "run_went_back"
    from_step: int
    to_step: int
    same_batches: bool
    """Whether it sees the same batches again; the second time to one state it sees others."""

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return f"steps in a row were bad: from {self.from_step} back to {self.to_step}"


class ActionApplied(BaseEvent):
    """An action of the policy was carried out; a gate may still have refused the stage."""

    type: Literal["action_applied"] = "action_applied"
    action: Action

    def __str__(self) -> str:
        return f"{action_words(self.action)} was carried out"


class ActionRefused(BaseEvent):
    """An action of the policy was not legal and had no effect."""

    type: Literal["action_refused"] = "action_refused"
    action: Action
    reason: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"an action was refused: {self.reason}"


class CheckpointSaved(BaseEvent):
    """The whole run was written to the disk; killed from now on, it goes on from here."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    name: str
    seconds: float


class CheckpointFailed(BaseEvent):
    """A checkpoint could not be written, or an older one not removed; training goes on."""

    type: Literal["checkpoint_failed"] = "checkpoint_failed"
    name: str
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return f"checkpoint {self.name} failed, training goes on: {self.error}"


class CheckpointDamaged(BaseEvent):
    """A checkpoint is not what was written, and an older one is taken."""

    type: Literal["checkpoint_damaged"] = "checkpoint_damaged"
    name: str
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"checkpoint {self.name} is damaged, an older one is taken: {self.error}"


class RunResumed(BaseEvent):
    """A run goes on from a checkpoint."""

    type: Literal["run_resumed"] = "run_resumed"
    name: str

    def __str__(self) -> str:
        return f"goes on from checkpoint {self.name}"


class CompileFailed(BaseEvent):
    """Something runs as it is, because compiling or capturing it did not work."""

    type: Literal["compile_failed"] = "compile_failed"
    place: str
    """Path of the module or of the slot; "the step" where that was to be a CUDA graph."""
    blueprint: str | None
    """None unless it is a seed."""
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        what = self.place if self.blueprint is None else f"{self.blueprint} in {self.place}"
        return f"{what} runs as it is, not compiled: {self.error}"


class StepCaptured(BaseEvent):
    """Forward and backward of a step are one CUDA graph from now on, while nothing changes."""

    type: Literal["step_captured"] = "step_captured"
    graphs: int
    """That are kept by now."""
    milliseconds: float
    """That capturing took."""

    def __str__(self) -> str:
        held_up = f"the run was held up for {1e-3 * self.milliseconds:.2f} s"
        return f"steps like this one are a CUDA graph from now on; {held_up}"


class ArtefactRefused(BaseEvent):
    """Compiled graphs that were kept are not used; they are compiled anew."""

    type: Literal["artefact_refused"] = "artefact_refused"
    blueprint: str
    reason: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"graphs kept of {self.blueprint} are not used: {self.reason}"


class CommandCarriedOut(BaseEvent):
    """What somebody asked of the run was done."""

    type: Literal["command_carried_out"] = "command_carried_out"
    id: str
    sender: str
    command: Command
    text: str
    """What came of it."""

    def __str__(self) -> str:
        return f"{command_words(self.command)}, asked by {self.sender}: {self.text}"


class CommandRefused(BaseEvent):
    """What somebody asked of the run had no effect."""

    type: Literal["command_refused"] = "command_refused"
    id: str
    sender: str
    command: Command
    reason: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        words = command_words(self.command)
        return f"{words}, asked by {self.sender}, was refused: {self.reason}"


class BusLost(BaseEvent):
    """The bus cannot be reached or takes nothing; training goes on, and telemetry is kept back."""

    type: Literal["bus_lost"] = "bus_lost"
    concern: str
    """What failed first."""
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"the bus is lost ({self.concern}), training goes on: {self.error}"


class BusRegained(BaseEvent):
    """The bus can be reached again."""

    type: Literal["bus_regained"] = "bus_regained"
    seconds: float
    """That it was away."""
    lost_messages: int
    """That found no room meanwhile. What was on its way when the bus went may have arrived all the
    same, which nobody here can know; what is missing for sure is in the router's run folder."""

    def __str__(self) -> str:
        lost = f", {self.lost_messages} messages found no room" if self.lost_messages else ""
        return f"the bus is back after {self.seconds:.1f} s{lost}"


class CachesSwept(BaseEvent):
    """Expired entries were dropped from the bounded caches."""

    type: Literal["caches_swept"] = "caches_swept"
    sizes: dict[str, int]
    hits: dict[str, int]
    misses: dict[str, int]


class SinkFailed(BaseEvent):
    """A sink raised, for the first time; training goes on, and the sink is called again."""

    type: Literal["sink_failed"] = "sink_failed"
    sink: str
    """Name of its class."""
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"{self.sink} failed, training goes on: {self.error}"


class SinkLossesCounted(BaseEvent):
    """At the end of a run, how much a failing sink did not take."""

    type: Literal["sink_losses_counted"] = "sink_losses_counted"
    sink: str
    """Name of its class."""
    lost_calls: int
    """That raised: an event, the metrics of an epoch, or making durable what was taken."""

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"{self.sink} failed {self.lost_calls} times in this run; what it has is not whole"
