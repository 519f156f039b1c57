"""Python code of one's own, by the name that it has on the command line."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

OWN_SCHEME = "python:MODULE:NAME"
_PREFIX = "python:"


def is_own(name: str) -> bool:
    """Whether a name is the place of an object in Python."""
    return name.startswith(_PREFIX)


def own_place(name: str, *, kind: str) -> tuple[ModuleType, str]:
    """Return the module of `python:MODULE:NAME`, and the NAME in it, which may be missing.

    Args:
        name: Of what is looked for.
        kind: What it must be, in a word, for errors.

    Raises:
        ValueError: The name is not of this form, or the module does not import.

    Effects: as `own_module`.
    """
    module_name, separator, attribute = name.removeprefix(_PREFIX).partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"a {kind} of one's own is named {OWN_SCHEME}, got {name!r}")
    try:
        return own_module(module_name), attribute
    except ValueError as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error


def own_module(name: str) -> ModuleType:
    """Import a module, from the working directory if it is there.

    Raises:
        ValueError: It does not import.

    Effects: puts the working directory on the module search path, as `python -m` does, and runs the
    module's code.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"importing {name!r} from {here} raised {type(error).__name__}: {error}"
        ) from error
