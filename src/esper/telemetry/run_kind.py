"""What kind of run a folder holds, told by its settings: a run, a training or an evaluation."""

from collections.abc import Mapping
from typing import Any

POLICY_TRAINING = "policy_training"
"""Key of a training's own settings in its folder's config.json; no other run has it."""

EVALUATION_FILE = "evaluation.json"
"""Settings of an evaluation of policies, whose folder is none of a run."""


def training_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the settings of the training of a policy, or None of any other run.

    Args:
        config: Of a run folder.

    >>> training_settings({"task": "digits", "policy_training": {"ray": None}})
    {'ray': None}
    >>> training_settings({"task": "digits", "trainer": {"epochs": 3}}) is None
    True
    """
    settings = config.get(POLICY_TRAINING)
    return settings if isinstance(settings, Mapping) else None
