"""Byte-level language modelling: Python's own standard library, a small decoder."""

from esper.tasks.text.task import TEXT

__all__ = ["TEXT"]
