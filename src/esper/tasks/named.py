"""Tasks by the name they have on the command line."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from esper.tasks.digits import DIGITS
from esper.tasks.task import Task

TASKS: Mapping[str, Task] = MappingProxyType({DIGITS.name: DIGITS})
"""Every bundled task."""


def named_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ValueError: There is no such task; the nearest names are listed.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"no task {name!r};{hint} tasks: {', '.join(TASKS)}")
    return TASKS[name]
