"""Blank figures to draw on."""

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return a white matplotlib figure.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 – an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'esper-lite[report]'"
        ) from error
    return Figure(figsize=(width, height), dpi=130, facecolor="white")
