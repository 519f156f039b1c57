"""Matmul precision is a choice per process."""

import subprocess
import sys

import pytest
import torch

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


NEWER_NAMES = """
import torch
from esper.compilation.process_settings import ProcessSettings
from esper.training import matmul_settings
fresh = ProcessSettings.here()
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert matmul_settings()["float32_matmul_precision"] == "tf32"
changed = ProcessSettings.here()
assert changed != fresh
for settings in (fresh, changed):
    settings.take()
    assert ProcessSettings.here() == settings, settings
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch 2.9")
def test_what_was_set_by_torchs_newer_names_is_told_and_taken_in_another_process() -> None:
    subprocess.run([sys.executable, "-c", NEWER_NAMES], check=True)


def test_precision_is_set_once_per_process() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
