"""A teacher and its student that lacks one block: where capacity is missing is known."""

from esper.tasks.teacher.task import TEACHER

__all__ = ["TEACHER"]
