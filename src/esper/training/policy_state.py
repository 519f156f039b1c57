"""What a policy remembers, kept with a run and given back to it."""

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from esper.slots.state_fields import check_fields
from esper.training.policy import Policy, StatefulPolicy

_decides_for: dict[int, weakref.ref[nn.Module]] = {}
"""The model that a policy has decided for, by the policy's id: it may have no hash."""


def note_decision(policy: Policy, model: nn.Module) -> None:
    """Take note that a policy is asked to decide for a model.

    Raises:
        ValueError: It remembers what it has decided for another one.
    """
    if not isinstance(policy, StatefulPolicy):
        return
    known = _decides_for.get(id(policy))
    if known is not None and known() is not model:
        raise ValueError(
            f"this {type(policy).__name__} has decided for another model, and would go by what it "
            "remembers of it; make a new one for each run"
        )
    if known is None:
        try:
            weakref.finalize(policy, _decides_for.pop, id(policy), None)
        except TypeError:  # its class has __slots__, and nothing could tell when it is gone
            return
        _decides_for[id(policy)] = weakref.ref(model)


def policy_state(policy: Policy) -> dict[str, Any]:
    """Return a policy's name, and a copy of what it remembers; None if it remembers nothing."""
    remembered = policy.state_dict() if isinstance(policy, StatefulPolicy) else None
    return {"name": policy.name, "state": copy.deepcopy(remembered)}


@contextmanager
def policy_remembering(policy: Policy, state: Mapping[str, Any]) -> Iterator[None]:
    """Give a policy its state back; if the block raises, the policy is again as it was.

    Args:
        policy: That a run goes on with.
        state: As `policy_state` returned it of the policy that the run had.

    Raises:
        ValueError: That was another policy, or a field is missing; nothing has changed.
    """
    check_fields(state, ("name", "state"), of="the policy")
    name, remembered = state["name"], state["state"]
    if policy.name != name:
        raise ValueError(
            f"the policy of the run was {name!r}, and is {policy.name!r} here; go on with the "
            "policy that the run began with, or begin a new run"
        )
    if isinstance(policy, StatefulPolicy) != (remembered is not None):
        has, had = ("a", "none") if remembered is None else ("no", "one")
        raise ValueError(
            f"policy {name!r} has {has} state, and that of the run had {had}; go on with the "
            "policy that the run began with, or begin a new run"
        )
    if not isinstance(policy, StatefulPolicy) or remembered is None:
        yield
        return
    own = policy_state(policy)["state"]
    try:
        policy.load_state_dict(copy.deepcopy(remembered))
        yield
    except BaseException:
        policy.load_state_dict(own)
        raise
    _decides_for.pop(id(policy), None)  # whatever it remembered is gone
