"""Byte-level language modelling: Python's own standard library, a small decoder."""

from esper.tasks.text.task import TEXT, TEXT_LARGE, TEXT_XL

__all__ = ["TEXT", "TEXT_LARGE", "TEXT_XL"]
