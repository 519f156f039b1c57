"""Commands that are printed to be copied, as the way on."""

import shlex
import shutil
import sys
from pathlib import Path


def command_line(*words: str | Path) -> str:
    """Return a call of this program that a shell takes as it is."""
    return f"{program()} {shlex.join(map(str, words))}"


def program() -> str:
    """Return how this program can be called again: by name if it is on the path."""
    if shutil.which("esper") is not None:
        return "esper"
    called = Path(sys.argv[0])
    return "python -m esper" if called.name == "__main__.py" else shlex.quote(str(called))
