"""Tasks of one's own, by the place of their `Task` in Python."""

from dataclasses import replace

from esper.own_code import own_place
from esper.tasks.task import Task


def own_task(name: str) -> Task:
    """Return the `Task` called NAME in MODULE, for `python:MODULE:NAME`.

    Raises:
        ValueError: The address is not of this form, the module does not import, or what it names is
            not there or no `Task`.

    Effects: as `esper.own_code.own_module`.
    """
    module, attribute = own_place(name, kind="task")
    task = getattr(module, attribute, None)
    if not isinstance(task, Task):
        tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
        raise ValueError(  # noqa: TRY004 – the name is what is wrong
            f"task {name!r}: {attribute!r} in {module.__file__} is "
            f"{'missing' if task is None else f'a {type(task).__name__}'}, and must be an "
            f"esper.tasks.Task; tasks there: {', '.join(tasks) or 'none'}"
        )
    return replace(task, name=name)
