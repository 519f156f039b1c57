"""What can happen to a seed or in its slot."""

from typing import Literal

from pydantic import JsonValue

from esper.lifecycle.alpha import AlphaCurve, BlendOperator
from esper.lifecycle.events.base import BaseEvent, Priority
from esper.lifecycle.gates import GateResult
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.stages import SeedStage
from esper.lifecycle.words import percent, refusal

CompiledBy = Literal["here", "worker", "store"]


class StageChanged(BaseEvent):
    """A slot's seed moved to another stage."""

    type: Literal["stage_changed"] = "stage_changed"
    slot: str
    blueprint: str | None
    from_stage: SeedStage
    to_stage: SeedStage

    def __str__(self) -> str:
        subject = self.slot if self.blueprint is None else f"{self.blueprint} in {self.slot}"
        return f"{subject} went from {self.from_stage.name} to {self.to_stage.name}"


class GateEvaluated(BaseEvent):
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


class SeedGerminated(BaseEvent):
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


class GerminationFailed(BaseEvent):
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


class AlphaTargetSet(BaseEvent):
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


class AlphaTargetReached(BaseEvent):
    """An alpha ramp arrived at its target."""

    type: Literal["alpha_target_reached"] = "alpha_target_reached"
    slot: str
    alpha: float

    def __str__(self) -> str:
        return f"alpha in {self.slot} arrived at {self.alpha:.4g}"


class AmplitudeSearched(BaseEvent):
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


class SeedRescaled(BaseEvent):
    """A seed's output layer was scaled so that alpha 1 is its best amplitude."""

    type: Literal["seed_rescaled"] = "seed_rescaled"
    slot: str
    factor: float

    def __str__(self) -> str:
        return f"the seed in {self.slot} was scaled by {self.factor:.4g}"


class ContributionMeasured(BaseEvent):
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


class GradientHealthMeasured(BaseEvent):
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

    def __str__(self) -> str:
        wrong = []
        if self.exploding and self.ratio is not None:
            wrong.append(f"is {self.ratio:.4g} times the host's")
        if self.nonfinite_steps > 0:
            wrong.append(f"was not finite in {self.nonfinite_steps:,} steps")
        if not wrong:
            return super().__str__()
        return f"the gradient of the seed in {self.slot} {' and '.join(wrong)}"


class IsolationChecked(BaseEvent):
    """What the isolation monitor did in a slot since it was last read."""

    type: Literal["isolation_checked"] = "isolation_checked"
    slot: str
    blueprint: str
    checks: int
    violations: int
    """Checks in which a gradient of the isolated seed reached the host."""
    without_verdict: int
    """Checks in which a gradient was not finite."""


class IsolationViolated(BaseEvent):
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


class SeedBlamed(BaseEvent):
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


class SeedCommitted(BaseEvent):
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


class SeedPruned(BaseEvent):
    """A seed was removed."""

    type: Literal["seed_pruned"] = "seed_pruned"
    slot: str
    blueprint: str
    from_stage: SeedStage
    reason: str

    def __str__(self) -> str:
        return f"{self.blueprint} pruned from {self.slot}: {self.reason}"


class SeedFailed(BaseEvent):
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


class SlotReset(BaseEvent):
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


class BreakerChanged(BaseEvent):
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


class SeedCompiled(BaseEvent):
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
