"""What decides when and where to grow."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from esper.lifecycle.actions import Action, Germinate, GrowthState


class Policy(Protocol):
    """Turns the state after an epoch into actions.

    Actions are carried out in order; each is checked against what is legal when its turn comes, and
    one that is not has no effect and is told as an event.
    """

    @property
    def name(self) -> str:
        """How the policy is called on the command line and in the run record."""

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return what to do now; an empty sequence waits."""


class DecidedByHand:
    """A policy that decides nothing: whoever holds the slots does, by their methods.

    Every seed is weighed, so that any gate may be asked.
    """

    name = "by hand"
    reads_losses = False

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot."""
        return [slot.path for slot in state.slots]

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return no action."""
        return ()


def checked_policy(policy: object) -> Policy:
    """Return what was passed as a policy; None is one that decides nothing.

    Raises:
        TypeError: It can decide nothing, as a name or a class.
    """
    if policy is None:
        return DecidedByHand()
    if isinstance(policy, type) or not callable(getattr(policy, "decide", None)):
        got = f"the class {policy.__name__}" if isinstance(policy, type) else repr(policy)
        raise TypeError(
            f"policy must be an object with decide(state), as esper.HeuristicPolicy() is, got "
            f"{got}; of a name esper.policies.named_policy makes one"
        )
    return cast("Policy", policy)


@runtime_checkable
class FrugalPolicy(Policy, Protocol):
    """A policy that says what has to be measured for it; for any other everything is."""

    @property
    def reads_losses(self) -> bool:
        """Whether it decides by the held-out loss itself, beside the gates' probes.

        An evaluation is a cost of growing then, and otherwise none: one that watches.
        """

    def weighs(self, state: GrowthState) -> Collection[str]:
        """Return the paths of slots whose seeds are to be weighed before `decide` is asked.

        Args:
            state: As `decide` will see it, but for what is weighed now.
        """


@runtime_checkable
class ForesightedPolicy(Policy, Protocol):
    """A policy that can say what it may ask for soon, so that it is compiled by then."""

    def upcoming(self, state: GrowthState) -> Sequence[Germinate]:
        """Return germinations, the likeliest first; some may never come.

        Args:
            state: As after the last decision.
        """


@runtime_checkable
class StatefulPolicy(Policy, Protocol):
    """A policy that remembers something between decisions, which a checkpoint must hold.

    It decides for one run: given to another, it would go by what it remembers of the first, so that
    a model after the first one is refused unless `load_state_dict` has made it another's.

    A policy without these methods is taken to decide by the state that it is given alone.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return it: mappings, lists, plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what was remembered then."""
