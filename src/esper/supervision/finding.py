"""What was found before anything was started."""

from typing import Literal

from esper.lifecycle.record import Record


class Finding(Record):
    """One thing that was looked at."""

    level: Literal["ok", "warning", "failure"]
    about: str
    text: str


def ok(about: str, text: str) -> Finding:
    """Return that something is as it should be."""
    return Finding(level="ok", about=about, text=text)


def warning(about: str, text: str) -> Finding:
    """Return that something will do, and may be regretted."""
    return Finding(level="warning", about=about, text=text)


def failure(about: str, text: str) -> Finding:
    """Return that nothing can be started because of something."""
    return Finding(level="failure", about=about, text=text)
