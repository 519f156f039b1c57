"""Events in words, for whoever watches a run."""

from collections.abc import Mapping
from types import MappingProxyType

from esper.lifecycle.commands import Act, Command
from esper.lifecycle.events import (
    ActionRefused,
    ArtefactRefused,
    BreakerChanged,
    BusLost,
    BusRegained,
    CheckpointDamaged,
    CheckpointFailed,
    CommandCarriedOut,
    CommandRefused,
    CompileFailed,
    EnvironmentRestarted,
    Event,
    EventRecord,
    GateEvaluated,
    GerminationFailed,
    IsolationViolated,
    RunFailed,
    RunResumed,
    RunWentBack,
    SeedBlamed,
    SeedCommitted,
    SeedCompiled,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    SinkFailed,
    SinkLossesCounted,
    SlotReset,
    StepCaptured,
    StepSkipped,
)
from esper.lifecycle.gates import Check, GateResult
from esper.lifecycle.stages import SeedStage

_REFUSED_FOR = "refused for"
_TOLD_GATES = (SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY)

CHECKS: Mapping[str, str] = MappingProxyType(
    {
        "identity_error": "How far the newborn seed's output is from its input, at most: a seed "
        "that changed anything at its birth would harm the host.",
        "shape_matches": "Whether the seed's output has the shape and the dtype of its input.",
        "parameters_finite": "Whether every number in the seed's parameters is finite.",
        "parameters_unshared": "Whether no parameter of the seed belongs to another module too.",
        "prewarmed": "Whether the seed has run once, in the slot's shape on the slot's device.",
        "breaker_closed": "Whether the seed's blueprint has not failed so often that it is not "
        "built for a while.",
        "isolation_leaks": "Ways found on which gradients of a seed that trains behind the host "
        "reach the host.",
        "training_steps": "Optimizer steps that the seed has learned behind the host.",
        "gradient_ratio": "The seed's gradient norm over the host's, each over the root of its "
        "size: too low and the seed learns nothing, too high and it explodes.",
        "line_search_gain_fraction": "Share of the held-out loss that the seed saves at its best "
        "amplitude, before it is blended in.",
        "alpha": "Share of the seed that is blended into the host.",
        "steps_at_target": "Optimizer steps that alpha has stood at its target.",
        "loss_increase_fraction": "Rise of the held-out loss since just before blending.",
        "contribution_fraction": "Share of the held-out loss that the seed saves, against the host "
        "without it.",
        "linear_share": "How much of what the seed adds is explained by the best linear map of the "
        "same features, which the host's own layers can learn.",
        "over_linear_fraction": "Share of the held-out loss that the seed saves, against the best "
        "linear map of the same features in its place.",
        "step_time_ratio": "Time of a step over that before the seed germinated.",
        "trial_epochs": "Decisions that the seed's trial has lasted.",
        "worst_in_trial_window": "The least that the seed has saved of the held-out loss at the "
        "last decisions of its trial, against the host without it.",
        "worst_over_linear_in_window": "The least that the seed has saved of the held-out loss at "
        "the last decisions of its trial, against the best linear map in its place.",
    }
)
"""What each check of a gate measures, by its name."""


def notable(record: EventRecord) -> str | None:
    """Return an event with its epoch if a person at the terminal would want to know, else None.

    Of an error that ends the run the program itself tells.
    """
    words = None if isinstance(record.event, RunFailed) else in_words(record)
    return None if words is None else f"epoch {record.epoch}: {words}"


def in_words(record: EventRecord) -> str | None:
    """Return an event in words if a person watching would want to know, else None."""
    event = record.event
    if isinstance(event, SeedGerminated):
        return f"{event.blueprint} germinated in {event.slot} (+{event.param_count:,})"
    if isinstance(event, SeedCommitted):
        saved = percent(event.contribution_fraction)
        weighed = (
            f"saves at least {saved} of the loss" if saved else "what it saves was never weighed"
        )
        return f"{event.blueprint} committed in {event.slot}, {weighed}"
    if isinstance(event, SeedPruned):
        return f"{event.blueprint} pruned from {event.slot}: {event.reason}"
    if isinstance(event, GateEvaluated):
        told = event.result.passed and event.to_stage in _TOLD_GATES
        return f"{event.blueprint} in {event.slot} passed {event.result.gate}" if told else None
    if isinstance(event, StepSkipped):
        return f"step {record.step} skipped: {event.reason}"
    seed, run = _of_a_seed_in_trouble(event), _of_the_run(event)
    return seed or run or _of_whoever_steers(event) or _of_the_compiler(event)


def refusal(result: GateResult) -> str:
    """Return which checks have failed, with what was measured and what was needed."""
    failed = "; ".join(
        f"{check.name} {measured(check)}, needs {needed(check)}" for check in result.failures
    )
    return f"{result.gate} refused: {failed}"


def measured(check: Check) -> str:
    """Return what a check has measured."""
    return "not measured" if check.measured is None else f"{check.measured:.4g}"


def needed(check: Check) -> str:
    """Return what a check needs to pass."""
    comparison = "" if check.comparison == "==" else f"{check.comparison} "
    return f"{comparison}{check.threshold:.4g}"


def refused_for(epochs: int, stage: SeedStage) -> str:
    """Return why a seed is pruned that the gate out of a stage has refused for too long."""
    return f"{_REFUSED_FOR} {epochs} epochs in {stage.name}"


def is_refusal(reason: str) -> bool:
    """Whether a seed was pruned because a gate has refused it: the reason is `refused_for`'s."""
    return reason.startswith(_REFUSED_FOR)


def percent(fraction: float | None) -> str:
    """Return a fraction as percent, or an empty string if there is none."""
    return "" if fraction is None else f"{100 * fraction:+.1f}%"


def _of_a_seed_in_trouble(event: Event) -> str | None:
    if isinstance(event, GerminationFailed):
        return f"{event.blueprint} could not germinate in {event.slot}: {event.error}"
    if isinstance(event, SeedFailed):
        return f"{event.blueprint} in {event.slot} failed: {event.error}"
    if isinstance(event, SeedBlamed):
        return (
            f"{event.blueprint} in {event.slot} is the fault of bad steps: the loss is "
            f"{event.loss:.4g} with it, {event.loss_without:.4g} without"
        )
    if isinstance(event, IsolationViolated):
        worst = ", ".join(event.reached)
        return (
            f"gradients of {event.blueprint} in {event.slot} reached "
            f"{event.num_reached} parameters of the host: {worst}"
        )
    if isinstance(event, SlotReset) and event.leftovers:
        return f"{event.slot} cannot be free again, left of its seed: {', '.join(event.leftovers)}"
    if isinstance(event, BreakerChanged) and event.to_state == "open":
        return f"{event.breaker} is not built for a while, after {event.failures} failures"
    if isinstance(event, ActionRefused):
        return f"an action was refused: {event.reason}"
    return None


def _of_the_run(event: Event) -> str | None:
    if isinstance(event, RunWentBack):
        return f"steps in a row were bad: from {event.from_step} back to {event.to_step}"
    if isinstance(event, RunFailed):
        return f"the run ended: {event.error}"
    if isinstance(event, RunResumed):
        return f"goes on from checkpoint {event.name}"
    if isinstance(event, CheckpointFailed):
        return f"checkpoint {event.name} failed, training goes on: {event.error}"
    if isinstance(event, CheckpointDamaged):
        return f"checkpoint {event.name} is damaged, an older one is taken: {event.error}"
    if isinstance(event, SinkFailed):
        return f"{event.sink} failed, training goes on: {event.error}"
    if isinstance(event, SinkLossesCounted):
        return f"{event.sink} failed {event.lost_calls} times in this run; what it has is not whole"
    return None


def _of_whoever_steers(event: Event) -> str | None:
    if isinstance(event, CommandCarriedOut):
        return f"{command_words(event.command)}, asked by {event.sender}: {event.text}"
    if isinstance(event, CommandRefused):
        words = command_words(event.command)
        return f"{words}, asked by {event.sender}, was refused: {event.reason}"
    if isinstance(event, EnvironmentRestarted):
        return f"an environment was started again, restart {event.num_restarts}: {event.reason}"
    if isinstance(event, BusLost):
        return f"the bus is lost ({event.concern}), training goes on: {event.error}"
    if isinstance(event, BusRegained):
        lost = f", {event.lost_messages} messages found no room" if event.lost_messages else ""
        return f"the bus is back after {event.seconds:.1f} s{lost}"
    return None


def command_words(command: Command) -> str:
    """Return a command as it is given to `esper send`, without what it leaves to its slot."""
    if not isinstance(command, Act):
        return command.command
    action = command.action.model_dump(mode="json", exclude_defaults=True)
    return " ".join([command.action.operation, *(str(value) for value in action.values())])


def _of_the_compiler(event: Event) -> str | None:
    if isinstance(event, SeedCompiled):
        held_up = f"the run was held up for {1e-3 * event.milliseconds:.2f} s"
        return f"{event.blueprint} in {event.slot} runs compiled; {held_up}"
    if isinstance(event, CompileFailed):
        what = event.place if event.blueprint is None else f"{event.blueprint} in {event.place}"
        return f"{what} runs as it is, not compiled: {event.error}"
    if isinstance(event, StepCaptured):
        held_up = f"the run was held up for {1e-3 * event.milliseconds:.2f} s"
        return f"steps like this one are a CUDA graph from now on; {held_up}"
    if isinstance(event, ArtefactRefused):
        return f"graphs kept of {event.blueprint} are not used: {event.reason}"
    return None
