"""Several processes stay one model while it grows: torchrun with gloo, for real."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

REPLICA = Path(__file__).parent / "replica.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def torchrun(folder: Path, scenario: str, processes: int) -> subprocess.CompletedProcess[str]:
    options = ("--standalone", "--nproc-per-node", str(processes))
    return run("-m", "torch.distributed.run", *options, str(REPLICA), str(folder), scenario)


@pytest.mark.parametrize("scenario", ["live", "behind"])
@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_and_weights_are_those_of_one_process_with_all_batches(
    processes: int, scenario: str, tmp_path: Path
) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    done = torchrun(together, scenario, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = run(str(REPLICA), str(alone), scenario, str(processes))
    assert reference.returncode == 0, reference.stderr[-3000:]
    wanted = safetensors.torch.load_file(alone / "rank0.safetensors")
    seeds = {key for key in wanted if "esper_slot" in key}
    assert any(" gradient " in key for key in seeds)
    assert any("first.esper_slot.branches.0" in key for key in seeds)
    assert any("second.esper_slot.branches.0" in key for key in seeds)
    for rank in range(processes):
        found = safetensors.torch.load_file(together / f"rank{rank}.safetensors")
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_processes_that_disagree_are_stopped_before_anything_is_attached(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "disagree", 2)
    assert done.returncode != 0
    assert "the network is not the same in all 2 processes" in done.stderr
    assert done.stderr.count("ReplicasDisagreeError") >= 2, "every process is told"


def test_survivors_of_a_killed_process_end_soon_with_a_clear_error(tmp_path: Path) -> None:
    started = time.monotonic()
    done = torchrun(tmp_path, "die", 3)
    assert done.returncode != 0
    assert time.monotonic() - started < 40.0
    assert "exitcode  : 7" in done.stderr.replace("exitcode: 7", "exitcode  : 7")
