"""What trackers show of an event: numbers under names, and those worth a line of text."""

from types import MappingProxyType

from esper.lifecycle.events import (
    AlphaTargetReached,
    AlphaTargetSet,
    AmplitudeSearched,
    ContributionMeasured,
    Event,
    EventRecord,
    GradientHealthMeasured,
    Priority,
    RunFinished,
    RunStarted,
    SeedCommitted,
    SeedGerminated,
    SeedPruned,
    StageChanged,
    TwinFinished,
)
from esper.lifecycle.notable import in_words
from esper.lifecycle.stages import SeedStage

STAGE_NUMBERS = MappingProxyType({stage: number for number, stage in enumerate(SeedStage)})
"""For tools that draw numbers only: DORMANT is 0, FOSSILIZED 6, what follows a prune above it."""


def run_values(event: Event) -> dict[str, float]:
    """Return what an event measures of the run as a whole."""
    if isinstance(event, RunStarted):
        return {"param_count": float(event.host_param_count)}
    if isinstance(event, RunFinished):
        tested = {f"test/{name}": value for name, value in event.metrics.items()}
        return {"param_count": float(event.param_count), **tested}
    if isinstance(event, TwinFinished):
        tested = {f"twin/{name}": value for name, value in event.metrics.items()}
        return {"twin/param_count": float(event.param_count), **tested}
    return {}


def slot_values(event: Event) -> dict[str, float]:
    """Return what an event measures in its slot; what was not measured is left out."""
    values = _measured_in_slot(event)
    return {name: float(value) for name, value in values.items() if value is not None}


def _measured_in_slot(event: Event) -> dict[str, float | None]:
    if isinstance(event, StageChanged):
        return {"stage": STAGE_NUMBERS[event.to_stage]}
    if isinstance(event, AlphaTargetSet):
        return {"alpha": event.from_alpha, "alpha_target": event.target}
    if isinstance(event, AlphaTargetReached):
        return {"alpha": event.alpha}
    if isinstance(event, GradientHealthMeasured):
        return {
            "gradient_ratio": event.ratio,
            "host_gradient_norm": event.host_norm,
            "seed_gradient_norm": event.seed_norm,
            "nonfinite_steps": event.nonfinite_steps,
        }
    if isinstance(event, ContributionMeasured):
        return {
            "contribution_fraction": event.contribution_fraction,
            "over_linear_fraction": event.over_linear_fraction,
        }
    if isinstance(event, AmplitudeSearched):
        return {"line_search_gain_fraction": event.gain_fraction}
    if isinstance(event, SeedGerminated):
        return {"alpha": 0.0, "seed_param_count": event.param_count}
    if isinstance(event, SeedCommitted):
        return {"seed_param_count": 0.0}
    if isinstance(event, SeedPruned):
        return {"alpha": 0.0, "seed_param_count": 0.0}
    return {}


def named_values(event: Event) -> dict[str, float]:
    """Return all that an event measures, a slot's values as slots/PATH/NAME."""
    slot = getattr(event, "slot", None)
    in_slot = {f"slots/{slot}/{name}": value for name, value in slot_values(event).items()}
    return {**run_values(event), **in_slot}


def told(record: EventRecord) -> str | None:
    """Return an event in words if a person would want to know, and in any case if it warns."""
    words = in_words(record)
    if words is None and record.event.priority is not Priority.NORMAL:
        return str(record.event)
    return words
