"""Bundled hosts and data sets, one folder each: `host.py`, `data.py`, `task.py`."""

from esper.tasks.named import TASKS, named_task
from esper.tasks.task import Task, TaskSetup

__all__ = ["TASKS", "Task", "TaskSetup", "named_task"]
