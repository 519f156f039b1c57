"""Tasks of one's own, by the place of their `Task` in Python."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

from esper.tasks.task import Task

OWN_SCHEME = "python:MODULE:NAME"
_PREFIX = "python:"


def is_own(name: str) -> bool:
    """Whether a task's name is the place of an object in Python."""
    return name.startswith(_PREFIX)


def own_task(name: str) -> Task:
    """Return the `Task` called NAME in MODULE, for `python:MODULE:NAME`.

    Raises:
        ValueError: The address is not of this form, the module does not import, or what it names is
            not there or no `Task`.

    Effects: puts the working directory on the module search path, as `python -m` does, and runs the
    module's code.
    """
    module_name, separator, attribute = name.removeprefix(_PREFIX).partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"a task of one's own is named {OWN_SCHEME}, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"task {name!r}: importing {module_name!r} from {here} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    task = getattr(module, attribute, None)
    if not isinstance(task, Task):
        tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
        raise ValueError(  # noqa: TRY004 – the name is what is wrong
            f"task {name!r}: {attribute!r} in {module.__file__} is "
            f"{'missing' if task is None else f'a {type(task).__name__}'}, and must be an "
            f"esper.tasks.Task; tasks there: {', '.join(tasks) or 'none'}"
        )
    return replace(task, name=name)
