"""What a process is set to, as far as compiled graphs depend on it."""

from typing import Any

import torch

from esper.lifecycle.record import Record

_CUDA_MATMUL: Any = torch.backends.cuda.matmul
_HAS_FP32_PRECISION = hasattr(torch.backends, "fp32_precision")
"""Since torch 2.9, which keeps "never set" apart from "highest", and compiled graphs with it."""


def float32_matmul_precision() -> str | None:
    """Return torch's setting of that name; None if torch's newer names were set to another one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # "mix of the legacy and new APIs"
        return None


class ProcessSettings(Record):
    """Settings of torch that hold for a whole process."""

    num_threads: int
    """Generated CPU code is for a number of threads."""
    matmul_precision: str | None
    """None if torch's newer names were set to another one."""
    cuda_fp32_precision: str | None
    """None before torch 2.9."""
    deterministic: bool
    warn_only: bool
    """Where no deterministic algorithm is known."""

    @classmethod
    def here(cls) -> "ProcessSettings":
        """Return what holds in this process."""
        return cls(
            num_threads=torch.get_num_threads(),
            matmul_precision=float32_matmul_precision(),
            cuda_fp32_precision=_CUDA_MATMUL.fp32_precision if _HAS_FP32_PRECISION else None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def take(self) -> None:
        """Let these hold in this process."""
        before = self.here()
        if self.num_threads != before.num_threads:
            torch.set_num_threads(self.num_threads)
        if self.matmul_precision not in (None, before.matmul_precision):
            torch.set_float32_matmul_precision(self.matmul_precision)
        if self.cuda_fp32_precision != self.here().cuda_fp32_precision:
            _CUDA_MATMUL.fp32_precision = self.cuda_fp32_precision
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
