"""Policies of one's own, by the place of their class in Python."""

from esper.own_code import own_place
from esper.training.policy import Policy, checked_policy


def own_policy(name: str) -> Policy:
    """Return what NAME in MODULE makes, for `python:MODULE:NAME`.

    Args:
        name: Of a class, or a function, which is called without arguments: each run gets a policy
            of its own.

    Raises:
        ValueError: The name is not of this form, the module does not import, or what it names is
            not there or makes no policy.

    Effects: as `esper.own_code.own_module`.
    """
    module, attribute = own_place(name, kind="policy")
    make = getattr(module, attribute, None)
    place = f"policy {name!r}: {attribute!r} in {module.__file__}"
    if not callable(make):
        found = "missing" if make is None else f"a {type(make).__name__}"
        raise ValueError(  # noqa: TRY004 – the name is what is wrong
            f"{place} is {found}, and must be the class of a policy or a function that makes one, "
            "as each run gets one of its own"
        )
    try:
        made = make()
    except Exception as error:
        raise ValueError(f"{place}: calling it raised {type(error).__name__}: {error}") from error
    named = isinstance(getattr(made, "name", None), str)
    if not (named and callable(getattr(made, "decide", None))):
        raise ValueError(
            f"{place} makes a {type(made).__name__}, and must make a policy, which has a name and "
            "decide(state)"
        )
    return checked_policy(made)
