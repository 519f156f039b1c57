"""Bundled hosts and data sets, one folder each: `host.py`, `data.py`, `task.py`."""

from esper.own_code import OWN_SCHEME
from esper.tasks.collection import SCHEMES
from esper.tasks.named import TASKS, named_task
from esper.tasks.task import Task, TaskDataError, TaskSetup

__all__ = ["OWN_SCHEME", "SCHEMES", "TASKS", "Task", "TaskDataError", "TaskSetup", "named_task"]
