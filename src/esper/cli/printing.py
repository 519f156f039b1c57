"""What is printed is shown as it is: text without markup, JSON that every parser takes."""

import json
from typing import Any

from rich.console import Console

from esper.report.chart import json_values


def plain_console() -> Console:
    """Return a console to which no path, name or error is markup, an emoji or a value to colour."""
    return Console(markup=False, emoji=False, highlight=False)


def print_json_line(console: Console, document: Any) -> None:
    """Print a JSON value in a line of its own; a number that is not finite is null in it."""
    console.out(json.dumps(json_values(document), allow_nan=False), highlight=False)
