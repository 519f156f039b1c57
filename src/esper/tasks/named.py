"""Tasks by the name they have on the command line."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from esper.own_code import OWN_SCHEME, is_own
from esper.tasks.collection import SCHEMES, collection_task
from esper.tasks.digits import DIGITS
from esper.tasks.own import own_task
from esper.tasks.task import Task
from esper.tasks.teacher import TEACHER
from esper.tasks.text import TEXT, TEXT_LARGE, TEXT_XL

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (DIGITS, TEACHER, TEXT, TEXT_LARGE, TEXT_XL)}
)
"""Every bundled task. `SCHEMES` are the kinds of data sets that can be named besides, and
`OWN_SCHEME` is how a task of one's own is."""


def named_task(name: str) -> Task:
    """Return a bundled task, the task of a data set (`hf:NAME`, `folder:PATH`), or one's own.

    Raises:
        ValueError: There is no such task; the nearest names are listed. A `TaskDataError` if a
            data set cannot be opened or used.
        ModuleNotFoundError: A data set is named and the `datasets` library is not installed.

    Effects: opens a data set that is named, which downloads one from the hub the first time; runs
        the code of a module that is named.
    """
    if name in TASKS:
        return TASKS[name]
    if is_own(name):
        return own_task(name)
    if ":" in name:
        return collection_task(name)
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"no task {name!r};{hint} tasks: {', '.join((*TASKS, *SCHEMES, OWN_SCHEME))}")
