"""One event type for each thing that can happen, with a priority that follows from it."""

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from esper.lifecycle.actions import Action
from esper.lifecycle.alpha import AlphaCurve, BlendOperator
from esper.lifecycle.commands import Command
from esper.lifecycle.gates import GateResult
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.record import Record
from esper.lifecycle.stages import SeedStage
from esper.lifecycle.words import action_words, command_words, percent, refusal

SCHEMA_VERSION: Final = 1
"""Version of the event records on disk and on the wire."""


class Priority(StrEnum):
    """How urgently an event must reach a person."""

    CRITICAL = "critical"
    WARNING = "warning"
    NORMAL = "normal"


class _Event(Record):
    """What every event shares: a priority derived from its type and content."""

    @property
    def priority(self) -> Priority:
        return Priority.NORMAL

    def __str__(self) -> str:
        """Return it in words, or what it holds; `repr` is exact."""
        fields = self.model_dump(mode="json")
        kind = fields.pop("type")
        return f"{kind}: {', '.join(f'{name}={value}' for name, value in fields.items())}"


class RunStarted(_Event):
    """A run began."""

    type: Literal["run_started"] = "run_started"
    slots: tuple[str, ...]
    host_param_count: int


class RunFinished(_Event):
    """A run came to its end."""

    type: Literal["run_finished"] = "run_finished"
    metrics: dict[str, float]
    param_count: int


class RunFailed(_Event):
    """An error has ended a run."""

    type: Literal["run_failed"] = "run_failed"
    error: str
    """What it says, after its kind."""

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return f"the run ended: {self.error}"


class TwinFinished(_Event):
    """The twin of a finished run, which never grew, came to its end with as many operations."""

    type: Literal["twin_finished"] = "twin_finished"
    metrics: dict[str, float]
    param_count: int
    epochs: int
    shared_steps: int
    """For how many steps both are the same run."""
    flops_fraction: float
    """Operations of the twin, as a share of the run's."""


class RewardGiven(_Event):
    """What came of a decision was weighed, for somebody who learns to decide."""

    type: Literal["reward_given"] = "reward_given"
    components: dict[str, float]
    """By name; see docs/policies.md."""
    total: float
    """Their sum."""


class EnvironmentRestarted(_Event):
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


class StageChanged(_Event):
    """A slot's seed moved to another stage."""

    type: Literal["stage_changed"] = "stage_changed"
    slot: str
    blueprint: str | None
    from_stage: SeedStage
    to_stage: SeedStage

    def __str__(self) -> str:
        subject = self.slot if self.blueprint is None else f"{self.blueprint} in {self.slot}"
        return f"{subject} went from {self.from_stage.name} to {self.to_stage.name}"


class GateEvaluated(_Event):
    """A gate judged a seed."""

    type: Literal["gate_evaluated"] = "gate_evaluated"
    slot: str
    blueprint: str
    to_stage: SeedStage
    result: GateResult

    def __str__(self) -> str:
        subject = f"{self.blueprint} in {self.slot}"
        if self.result.passed:
            return f"{subject} passed {self.result.gate}"
        all_the_same = "; it was forced" if self.result.forced else ""
        return f"{subject}: {refusal(self.result)}{all_the_same}"


class SeedGerminated(_Event):
    """A seed was built in a slot."""

    type: Literal["seed_germinated"] = "seed_germinated"
    slot: str
    blueprint: str
    options: dict[str, JsonValue]
    param_count: int
    blend_operator: BlendOperator
    isolation: Isolation
    objective: SeedObjective
    prewarm_ms: float

    def __str__(self) -> str:
        return f"{self.blueprint} germinated in {self.slot} (+{self.param_count:,})"


class GerminationFailed(_Event):
    """A seed could not be built; the slot is as it was."""

    type: Literal["germination_failed"] = "germination_failed"
    slot: str
    blueprint: str
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"{self.blueprint} could not germinate in {self.slot}: {self.error}"


class AlphaTargetSet(_Event):
    """An alpha ramp began."""

    type: Literal["alpha_target_set"] = "alpha_target_set"
    slot: str
    from_alpha: float
    target: float
    steps: int
    curve: AlphaCurve

    def __str__(self) -> str:
        return (
            f"alpha in {self.slot} goes from {self.from_alpha:.4g} to {self.target:.4g} "
            f"in {self.steps} steps, {self.curve}"
        )


class AlphaTargetReached(_Event):
    """An alpha ramp arrived at its target."""

    type: Literal["alpha_target_reached"] = "alpha_target_reached"
    slot: str
    alpha: float

    def __str__(self) -> str:
        return f"alpha in {self.slot} arrived at {self.alpha:.4g}"


class AmplitudeSearched(_Event):
    """Several amplitudes of a TRAINING seed were tried on held-out data."""

    type: Literal["amplitude_searched"] = "amplitude_searched"
    slot: str
    amplitudes: tuple[float, ...]
    losses: tuple[float, ...]
    host_loss: float
    best_amplitude: float
    rescaled_loss: float
    """At alpha 1 with the output layers scaled by the best amplitude, as blending begins with them;
    for a seed that is not linear in them not the loss at that amplitude."""
    gain_fraction: float
    """What `rescaled_loss` saves relative to `host_loss`, standard errors below its mean."""


class SeedRescaled(_Event):
    """A seed's output layer was scaled so that alpha 1 is its best amplitude."""

    type: Literal["seed_rescaled"] = "seed_rescaled"
    slot: str
    factor: float

    def __str__(self) -> str:
        return f"the seed in {self.slot} was scaled by {self.factor:.4g}"


class ContributionMeasured(_Event):
    """Held-out loss with and without a seed was measured."""

    type: Literal["contribution_measured"] = "contribution_measured"
    slot: str
    stage: SeedStage
    loss_with: float
    loss_without: float
    contribution_fraction: float
    """Saving relative to `loss_without`, mean over samples."""
    standard_error_fraction: float | None
    """Of that mean; None where losses per sample are not known."""
    linear_loss: float | None = None
    """With the best linear map of the features in the seed's place; without it where nothing of
    the host learns; None if the seed's increment was not finite, or no gate asks."""
    linear_share: float | None = None
    """Of the seed's increment, what that map explains."""
    over_linear_fraction: float | None = None
    """Saving relative to `linear_loss`, mean over samples."""
    over_linear_standard_error_fraction: float | None = None


class GradientHealthMeasured(_Event):
    """Mean gradient norms of host and seed over the last epoch."""

    type: Literal["gradient_health_measured"] = "gradient_health_measured"
    slot: str
    host_norm: float
    seed_norm: float
    ratio: float | None
    nonfinite_steps: int
    """Since the seed was born: those in which a gradient of it was not finite, and became zero."""
    vanishing: bool
    exploding: bool

    @property
    def priority(self) -> Priority:
        unhealthy = self.exploding or self.nonfinite_steps > 0
        return Priority.WARNING if unhealthy else Priority.NORMAL


class IsolationChecked(_Event):
    """What the isolation monitor did in a slot since it was last read."""

    type: Literal["isolation_checked"] = "isolation_checked"
    slot: str
    blueprint: str
    checks: int
    violations: int
    """Checks in which a gradient of the isolated seed reached the host."""
    without_verdict: int
    """Checks in which a gradient was not finite."""


class IsolationViolated(_Event):
    """A gradient of an isolated seed reached the host."""

    type: Literal["isolation_violated"] = "isolation_violated"
    slot: str
    blueprint: str
    reached: dict[str, float]
    """Host parameters, worst first, a few: the leak's projection over the norm of the gradient that
    the parameter has without the seed."""
    num_reached: int
    """All host parameters that were reached."""

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return (
            f"gradients of {self.blueprint} in {self.slot} reached "
            f"{self.num_reached} parameters of the host: {', '.join(self.reached)}"
        )


class SeedCommitted(_Event):
    """A seed passed to the host for good."""

    type: Literal["seed_committed"] = "seed_committed"
    slot: str
    blueprint: str
    param_count: int
    contribution_fraction: float | None
    """What it saves at least, as gates judge it: standard errors below the mean that was last
    measured, or that mean where losses per sample are not known."""

    def __str__(self) -> str:
        saved = percent(self.contribution_fraction)
        weighed = (
            f"saves at least {saved} of the loss" if saved else "what it saves was never weighed"
        )
        return f"{self.blueprint} committed in {self.slot}, {weighed}"


class SeedPruned(_Event):
    """A seed was removed."""

    type: Literal["seed_pruned"] = "seed_pruned"
    slot: str
    blueprint: str
    from_stage: SeedStage
    reason: str

    def __str__(self) -> str:
        return f"{self.blueprint} pruned from {self.slot}: {self.reason}"


class SeedFailed(_Event):
    """A seed's forward raised; the host went on without it."""

    type: Literal["seed_failed"] = "seed_failed"
    slot: str
    blueprint: str
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return f"{self.blueprint} in {self.slot} failed: {self.error}"


class SlotReset(_Event):
    """What was still found of a removed seed; empty when nothing was."""

    type: Literal["slot_reset"] = "slot_reset"
    slot: str
    leftovers: tuple[str, ...]

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL if self.leftovers else Priority.NORMAL

    def __str__(self) -> str:
        if not self.leftovers:
            return f"nothing is left of the seed in {self.slot}"
        left = ", ".join(self.leftovers)
        return f"{self.slot} cannot be free again, left of its seed: {left}"


class BreakerChanged(_Event):
    """A circuit breaker opened, half-opened or closed."""

    type: Literal["breaker_changed"] = "breaker_changed"
    breaker: str
    from_state: str
    to_state: str
    failures: int

    @property
    def priority(self) -> Priority:
        return Priority.WARNING if self.to_state == "open" else Priority.NORMAL

    def __str__(self) -> str:
        if self.to_state == "open":
            return f"{self.breaker} is not built for a while, after {self.failures} failures"
        return super().__str__()


class StepSkipped(_Event):
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


class SeedBlamed(_Event):
    """Steps in a row were bad, and are not without this seed, which is pruned."""

    type: Literal["seed_blamed"] = "seed_blamed"
    slot: str
    blueprint: str
    loss: float
    """Of the last bad batch."""
    loss_without: float
    """The same, with the seed left out."""

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return (
            f"{self.blueprint} in {self.slot} is the fault of bad steps: the loss is "
            f"{self.loss:.4g} with it, {self.loss_without:.4g} without"
        )


class RunWentBack(_Event):
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


class ActionApplied(_Event):
    """An action of the policy was carried out; a gate may still have refused the stage."""

    type: Literal["action_applied"] = "action_applied"
    action: Action

    def __str__(self) -> str:
        return f"{action_words(self.action)} was carried out"


class ActionRefused(_Event):
    """An action of the policy was not legal and had no effect."""

    type: Literal["action_refused"] = "action_refused"
    action: Action
    reason: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"an action was refused: {self.reason}"


class CheckpointSaved(_Event):
    """The whole run was written to the disk; killed from now on, it goes on from here."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    name: str
    seconds: float


class CheckpointFailed(_Event):
    """A checkpoint could not be written, or an older one not removed; training goes on."""

    type: Literal["checkpoint_failed"] = "checkpoint_failed"
    name: str
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.CRITICAL

    def __str__(self) -> str:
        return f"checkpoint {self.name} failed, training goes on: {self.error}"


class CheckpointDamaged(_Event):
    """A checkpoint is not what was written, and an older one is taken."""

    type: Literal["checkpoint_damaged"] = "checkpoint_damaged"
    name: str
    error: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"checkpoint {self.name} is damaged, an older one is taken: {self.error}"


class RunResumed(_Event):
    """A run goes on from a checkpoint."""

    type: Literal["run_resumed"] = "run_resumed"
    name: str

    def __str__(self) -> str:
        return f"goes on from checkpoint {self.name}"


CompiledBy = Literal["here", "worker", "store"]


class SeedCompiled(_Event):
    """Everything that a seed will run in the stages to come is compiled."""

    type: Literal["seed_compiled"] = "seed_compiled"
    slot: str
    blueprint: str
    kinds: int
    """Of forward, each a graph unless it was there already."""
    checked: bool
    """Whether results and gradients were compared with the seed's own."""
    source: CompiledBy
    """Who compiled: this process, which waited for it; another one, ahead; or one long ago."""
    milliseconds: float
    """That this process took for it, between two steps."""

    def __str__(self) -> str:
        held_up = f"the run was held up for {1e-3 * self.milliseconds:.2f} s"
        return f"{self.blueprint} in {self.slot} runs compiled; {held_up}"


class CompileFailed(_Event):
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


class StepCaptured(_Event):
    """Forward and backward of a step are one CUDA graph from now on, while nothing changes."""

    type: Literal["step_captured"] = "step_captured"
    graphs: int
    """That are kept by now."""
    milliseconds: float
    """That capturing took."""

    def __str__(self) -> str:
        held_up = f"the run was held up for {1e-3 * self.milliseconds:.2f} s"
        return f"steps like this one are a CUDA graph from now on; {held_up}"


class ArtefactRefused(_Event):
    """Compiled graphs that were kept are not used; they are compiled anew."""

    type: Literal["artefact_refused"] = "artefact_refused"
    blueprint: str
    reason: str

    @property
    def priority(self) -> Priority:
        return Priority.WARNING

    def __str__(self) -> str:
        return f"graphs kept of {self.blueprint} are not used: {self.reason}"


class CommandCarriedOut(_Event):
    """What somebody asked of the run was done."""

    type: Literal["command_carried_out"] = "command_carried_out"
    id: str
    sender: str
    command: Command
    text: str
    """What came of it."""

    def __str__(self) -> str:
        return f"{command_words(self.command)}, asked by {self.sender}: {self.text}"


class CommandRefused(_Event):
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


class BusLost(_Event):
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


class BusRegained(_Event):
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


class CachesSwept(_Event):
    """Expired entries were dropped from the bounded caches."""

    type: Literal["caches_swept"] = "caches_swept"
    sizes: dict[str, int]
    hits: dict[str, int]
    misses: dict[str, int]


class SinkFailed(_Event):
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


class SinkLossesCounted(_Event):
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


Event = Annotated[
    RunStarted
    | RunFinished
    | RunFailed
    | TwinFinished
    | RewardGiven
    | EnvironmentRestarted
    | StageChanged
    | GateEvaluated
    | SeedGerminated
    | GerminationFailed
    | AlphaTargetSet
    | AlphaTargetReached
    | AmplitudeSearched
    | SeedRescaled
    | ContributionMeasured
    | GradientHealthMeasured
    | IsolationChecked
    | IsolationViolated
    | SeedCommitted
    | SeedPruned
    | SeedFailed
    | SlotReset
    | BreakerChanged
    | StepSkipped
    | SeedBlamed
    | RunWentBack
    | ActionApplied
    | ActionRefused
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointDamaged
    | RunResumed
    | SeedCompiled
    | CompileFailed
    | StepCaptured
    | ArtefactRefused
    | CommandCarriedOut
    | CommandRefused
    | BusLost
    | BusRegained
    | CachesSwept
    | SinkFailed
    | SinkLossesCounted,
    Field(discriminator="type"),
]


class EventRecord(Record):
    """An event with when it happened, as stored and sent."""

    schema_version: Literal[1] = SCHEMA_VERSION
    time_seconds: float
    """Seconds since the Unix epoch."""
    epoch: int
    """Decisions so far; what is measured for one, and what comes of it, counts it already."""
    step: int
    event: Event


class EventSchemaError(ValueError):
    """A stored or received event that this version cannot read."""


_RECORD: TypeAdapter[EventRecord] = TypeAdapter(EventRecord)
_NOT_A_RECORD = f"not an event record of schema version {SCHEMA_VERSION}"


def parse_event_record(document: str | bytes) -> EventRecord:
    """Read an event record from JSON.

    Raises:
        EventSchemaError: The schema version is missing or another one, or a field or type is
            unknown; the message names it.
    """
    try:
        record = _RECORD.validate_json(document)
    except ValidationError as error:
        details = "; ".join(_describe(issue) for issue in error.errors())
        raise EventSchemaError(f"{_NOT_A_RECORD}: {details}") from error
    if "schema_version" not in record.model_fields_set:
        raise EventSchemaError(f"{_NOT_A_RECORD}: schema_version: Field required")
    return record


def _describe(issue: ErrorDetails) -> str:
    place = ".".join(str(part) for part in issue["loc"]) or "document"
    given = issue["input"]
    got = f", got {given!r}" if issue["type"] == "literal_error" else ""
    return f"{place}: {issue['msg']}{got}"
