"""Matmul precision: set once per process, visible in the run record."""

from typing import Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]

_chosen: MatmulPrecision | None = None


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Choose float32 matmul precision for the whole process; "high" allows TF32 on a GPU.

    Raises:
        RuntimeError: Another precision was chosen before; results of one process must not depend
            on the order of its runs.
    """
    global _chosen
    if _chosen is not None and _chosen != precision:
        raise RuntimeError(
            f"matmul precision is {_chosen!r} in this process already; asked for {precision!r}. "
            "Start another process for it"
        )
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    _chosen = precision


def matmul_settings() -> dict[str, str | bool]:
    """Return what is in force now, whoever set it."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": bool(torch.backends.cudnn.allow_tf32),
    }
