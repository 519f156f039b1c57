"""What events are made of, in words: gates and their checks, commands, shares."""

from collections.abc import Mapping
from types import MappingProxyType

from esper.lifecycle.actions import Action
from esper.lifecycle.commands import Act, Command
from esper.lifecycle.gates import Check, GateResult
from esper.lifecycle.stages import SeedStage

_REFUSED_FOR = "refused for"

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


def command_words(command: Command) -> str:
    """Return a command as it is given to `esper send`, without what it leaves to its slot."""
    return action_words(command.action) if isinstance(command, Act) else command.command


def action_words(action: Action) -> str:
    """Return an action as it is given to `esper send`, without what it leaves to its slot."""
    given = action.model_dump(mode="json", exclude_defaults=True)
    return " ".join([action.operation, *(str(value) for value in given.values())])
