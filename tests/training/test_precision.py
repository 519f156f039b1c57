"""Matmul precision is a choice per process."""

import subprocess
import sys

SCRIPT = """
import torch
from esper.training import matmul_settings, set_matmul_precision
set_matmul_precision("high")
set_matmul_precision("high")
assert matmul_settings()["float32_matmul_precision"] == "high"
try:
    set_matmul_precision("highest")
except RuntimeError as error:
    assert "'high'" in str(error)
else:
    raise SystemExit("a second choice was accepted")
assert torch.get_float32_matmul_precision() == "high"
"""


def test_precision_is_set_once_per_process() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
