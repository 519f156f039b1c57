"""Policies by the name they have on the command line and in a config file."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from esper.own_code import OWN_SCHEME, is_own
from esper.policies.growth_schedule import (
    SLOPE,
    GrowthScheduleConfig,
    GrowthSchedulePolicy,
    slope_policy,
)
from esper.policies.heuristic import UCB1_POLICY, HeuristicPolicy, ucb1_policy
from esper.policies.own import own_policy
from esper.policies.planned import PlannedPolicy
from esper.policies.random import RandomPolicy
from esper.training.policy import Policy

NEVER = "none"
"""The policy that never grows anything."""


def _never(_: int) -> Policy:
    policy = PlannedPolicy({})
    policy.name = NEVER
    return policy


_MAKERS: Mapping[str, Callable[[int], Policy]] = {
    "heuristic": lambda _: HeuristicPolicy(),
    UCB1_POLICY: lambda _: ucb1_policy(),
    "schedule": lambda _: GrowthSchedulePolicy(),
    SLOPE: lambda _: slope_policy(GrowthScheduleConfig()),
    "random": RandomPolicy,
    NEVER: _never,
}
POLICY_NAMES: tuple[str, ...] = tuple(_MAKERS)
"""Names of the policies that need no further arguments."""


POLICY_FILE_SUFFIX = ".safetensors"


def is_policy_file(policy: str) -> bool:
    """Whether a policy is named by the file that it was learned into."""
    return policy.endswith(POLICY_FILE_SUFFIX)


def policy_of_anywhere(policy: str) -> str:
    """Return a policy's name, or its file's absolute path: the same from any folder."""
    return str(Path(policy).absolute()) if is_policy_file(policy) else policy


def policy_words(policy: str, among: Sequence[str] = ()) -> str:
    """Return how a table calls a policy: of a file, as much as no other one there has."""
    if not is_policy_file(policy):
        return policy
    parts = Path(policy).with_suffix("").parts
    others = [Path(other).with_suffix("").parts for other in among if other != policy]
    num_told = next(
        (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)),
        len(parts),
    )
    return str(Path(*parts[-num_told:]))


def named_policy(name: str, *, random_seed: int) -> Policy:
    """Return a policy by name, or one's own by its place in Python, `python:MODULE:NAME`.

    Raises:
        ValueError: There is no such policy; the nearest names are listed.

    Effects: runs the code of a module that is named.
    """
    if is_own(name):
        return own_policy(name)
    maker = _MAKERS.get(name)
    if maker is None:
        forgotten = [f"python:{name}"] if name.count(":") == 1 else []
        nearest = forgotten or difflib.get_close_matches(name, POLICY_NAMES, n=1)
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"no policy {name!r};{hint} policies: {', '.join(POLICY_NAMES)}, {OWN_SCHEME}, or a "
            f"file NAME{POLICY_FILE_SUFFIX}, as esper policy train writes"
        )
    return maker(random_seed)
