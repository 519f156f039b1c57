"""What a policy answers; of several processes that train one model the first one's does, for all.

It alone is asked, since a policy may go by what it has decided.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from esper.lifecycle.actions import Action, Germinate, GrowthState, action_from_dump
from esper.slots.replication import Replication
from esper.slots.slot_set import SlotSet
from esper.training.policy import ForesightedPolicy, FrugalPolicy, Policy
from esper.training.policy_state import note_decision


def decided(policy: Policy, state: GrowthState, slots: SlotSet) -> Sequence[Action]:
    """Return what is to be done now.

    Raises:
        ValueError: The policy remembers what it has decided for another model.
    """
    note_decision(policy, slots.model)
    return _actions(lambda: policy.decide(state), slots.replication)


def upcoming(
    policy: ForesightedPolicy, state: GrowthState, replication: Replication | None
) -> Sequence[Germinate]:
    """Return what may come soon."""
    actions = _actions(lambda: policy.upcoming(state), replication)
    return [action for action in actions if isinstance(action, Germinate)]


def weighed(
    policy: FrugalPolicy, state: GrowthState, replication: Replication | None
) -> Collection[str]:
    """Return the paths of the slots whose seeds are to be weighed."""
    if replication is None:
        return policy.weighs(state)
    paths: list[str] = replication.from_first(
        list(policy.weighs(state)) if replication.rank == 0 else []
    )
    return paths


def _actions(
    ask: Callable[[], Sequence[Action]], replication: Replication | None
) -> Sequence[Action]:
    if replication is None:
        return ask()
    answer: list[Any] = []
    if replication.rank == 0:
        answer = [action.model_dump(mode="json") for action in ask()]
    return [action_from_dump(action) for action in replication.from_first(answer)]
