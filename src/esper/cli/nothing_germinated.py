"""Why nothing germinated in a run, as far as its settings tell."""

import math

from esper.experiments.config import RunConfig
from esper.policies.heuristic import UCB1_POLICY, HeuristicPolicy
from esper.policies.named import NEVER
from esper.telemetry.progress import progress_of

_MORE_TIME = "train for more --epochs, or --set other values"


def why_nothing_germinated(settings: RunConfig, num_decisions: int) -> str | None:
    """Return what kept a run's policy from germinating anything, or what it has waited for.

    None of a policy that only itself could tell of.

    Args:
        settings: Of the run.
        num_decisions: That there were: epochs, unless the settings ask for others.
    """
    policy, heuristic = settings.policy, settings.heuristic
    if policy == NEVER:
        return f"the policy {NEVER!r} never grows"
    if policy not in (HeuristicPolicy.name, UCB1_POLICY):
        return None
    unit = progress_of(settings.model_dump()).unit
    warmup, plateau = heuristic.warmup_epochs, heuristic.plateau_epochs
    first, fraction = max(warmup, plateau + 1), heuristic.last_germination_fraction
    because = f"warmup_epochs={warmup}" if warmup > plateau else f"plateau_epochs={plateau}"
    begins = f"{policy} lets nothing germinate before {unit} {first} (heuristic.{because})"
    if first > num_decisions:
        return f"{begins}, and the run had {num_decisions}; {_MORE_TIME}"
    if first > fraction * num_decisions:
        last = math.floor(fraction * num_decisions)
        until = f"after {unit} {last} (heuristic.last_germination_fraction={fraction:g})"
        return f"{begins} nor {until}; {_MORE_TIME}"
    return (
        f"{policy} waits until the held-out loss falls by less than heuristic.plateau_fraction="
        f"{heuristic.plateau_fraction:g} in heuristic.plateau_epochs={plateau} {unit}s"
    )
