"""What a run's progress is counted in, and how far it is to go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from esper.telemetry.run_kind import training_settings

Unit = Literal["epoch", "decision", "rollout"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the epoch of an event or a value counts.

    Attributes:
        unit: Epochs; or decisions of a run that decides every so many steps; or rollouts of the
            training of a policy.
        total: Of them; None where it is not known beforehand.
    """

    unit: Unit = "epoch"
    total: int | None = None


def progress_of(config: Mapping[str, Any]) -> Progress:
    """Return what a run with these settings counts.

    >>> progress_of({"trainer": {"epochs": 3}})
    Progress(unit='epoch', total=3)
    >>> progress_of({"trainer": {"epochs": 3, "decision_interval_steps": 50}})
    Progress(unit='decision', total=None)
    >>> progress_of({"policy_training": {}})
    Progress(unit='rollout', total=None)
    """
    if training_settings(config) is not None:
        return Progress(unit="rollout")
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        return Progress()
    if trainer.get("decision_interval_steps") is not None:
        return Progress(unit="decision")
    return Progress(total=whole_number(trainer.get("epochs")))


def whole_number(value: object) -> int | None:
    """Return a setting that should be a whole number, or None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
