"""Handwritten digits: bundled real data, a CNN of 678 parameters."""

from esper.tasks.digits.task import DIGITS

__all__ = ["DIGITS"]
