"""Precision of a run: what autocast computes in, and matmuls, which are set once per process."""

from typing import Any, Literal

import torch

from esper.compilation.process_settings import float32_matmul_precision

Precision = Literal["float32", "bfloat16", "float16"]
"""What a step computes in."""
MatmulPrecision = Literal["highest", "high", "medium"]

_chosen: MatmulPrecision | None = None


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return torch's autocast to a precision, which does nothing for float32."""
    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


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
    """Return what is in force now, whoever set it, and by torch's older or newer names."""
    newer: Any = torch.backends.cuda.matmul
    return {
        "float32_matmul_precision": float32_matmul_precision() or newer.fp32_precision,
        "cudnn_allow_tf32": bool(torch.backends.cudnn.allow_tf32),
    }
