"""Several processes stay one model while it grows: torchrun with gloo, for real."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import esper
from processes import TESTS, run_python, torchrun

REPLICA = Path(__file__).parent / "replica.py"
OWN_LOOP = Path(__file__).parent / "own_loop.py"
FAILED_AFTER_STEP = {
    "left out at first": None,
    "left out in one": None,
    "skipped": None,
    "raises": 4,
    "raises frozen": 4,
    "raises, told late": 5,
    "raises, then decision": 4,
    "raises, then by hand": 5,
    "raises while measured": 4,
}
"""By scenario of a loop of one's own, when a seed failed in all processes."""


@pytest.mark.parametrize(
    ("scenario", "processes"),
    [
        *(
            (scenario, processes)
            for scenario in ("live", "behind", "sharded live", "sharded behind")
            for processes in (2, 3)
        ),
        ("compiled live", 2),
        ("compiled behind", 2),
        ("as one graph live", 2),
    ],
)
def test_gradients_and_weights_are_those_of_one_process_with_all_batches(
    processes: int, scenario: str, tmp_path: Path
) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    done = torchrun(REPLICA, str(together), scenario, processes=processes)
    # All of it: torchrun's own words come last, and why the first process ended comes first.
    assert done.returncode == 0, done.stderr
    reference = run_python(str(REPLICA), str(alone), scenario, str(processes))
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


@pytest.fixture(scope="module")
def own_loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_loops")
    done = torchrun(OWN_LOOP, str(folder), *FAILED_AFTER_STEP)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("scenario", "failed_after"), FAILED_AFTER_STEP.items())
def test_seeds_stay_one_model_in_a_loop_of_ones_own(
    scenario: str, failed_after: int | None, own_loops: Path
) -> None:
    files = [own_loops / f"{scenario} {rank}.safetensors" for rank in (0, 1)]
    first, second = map(safetensors.torch.load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    learned = first.get("second.esper_slot.branches.0.seed.layer.weight")
    assert (learned is None) == (failed_after is not None)
    assert learned is None or learned.any()
    for rank in (0, 1):
        told = (own_loops / f"{scenario} {rank}.txt").read_text()
        error = "MemoryError: of the test (in process 1)"
        assert told == ("" if failed_after is None else f"{failed_after} second {error}")


def test_processes_that_disagree_are_stopped_before_anything_is_attached(tmp_path: Path) -> None:
    done = torchrun(REPLICA, str(tmp_path), "disagree")
    assert done.returncode != 0
    assert "the network is not the same in all 2 processes" in done.stderr
    assert done.stderr.count("ReplicasDisagreeError") >= 2, "every process is told"


def test_all_processes_go_back_where_the_losses_of_one_are_bad(tmp_path: Path) -> None:
    done = torchrun(REPLICA, str(tmp_path), "spoilt")
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].count("step_skipped") == 3
    assert told[0].count("run_went_back") == 1
    found = [safetensors.torch.load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    last = max(found[0])[:3]
    weights = [key for key in found[0] if key.startswith(f"{last} weight ")]
    assert weights
    assert all(torch.equal(found[0][key], found[1][key]) for key in weights)


@pytest.mark.parametrize(
    ("scenario", "forward"), [("unwrapped", "Sequential"), ("forgotten", "Host")]
)
def test_a_forward_that_would_train_each_process_for_itself_is_refused(
    scenario: str, forward: str, tmp_path: Path
) -> None:
    done = torchrun(REPLICA, str(tmp_path), scenario)
    assert done.returncode != 0
    assert f"2 processes run, and no DistributedDataParallel is in the {forward}" in done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [({"isolation": "shadowing", "objective": "shadow"}, "learn in shadow"), ({}, "not sharded")],
)
def test_what_cannot_be_sharded_is_refused(config: dict[str, str], message: str) -> None:
    host = torch.nn.Sequential(torch.nn.Linear(4, 4))
    slots = esper.attach(host, ["0"], example=torch.zeros(2, 4), config=esper.SlotConfig(**config))
    with pytest.raises(ValueError, match=message):
        slots.replicate_sharded(lambda seed: None)
    assert not slots.sharded
    assert slots.replication is None


def test_survivors_of_a_killed_process_end_soon_with_a_clear_error(tmp_path: Path) -> None:
    """Without torchrun, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(REPLICA), str(tmp_path), "die"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **address,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(TESTS),
                "RANK": str(rank),
            },
        )
        for rank in range(3)
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, _, code in ended] == [1, 7, 1]
    died = float(ended[1][0].split("dies at ")[1].split()[0])
    for rank in (0, 2):
        output, errors, _ = ended[rank]
        assert float(output.split("lost at ")[1].split()[0]) - died < 10.0
        assert f"rank {rank} of 3 waits for a process that does not answer" in errors


@pytest.mark.parametrize("kind", ["", "random ", "sharded "])
def test_a_run_that_torchrun_starts_again_finishes_as_if_nothing_had_happened(
    tmp_path: Path, kind: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    done = torchrun(REPLICA, str(whole), f"{kind}behind")
    assert done.returncode == 0, done.stderr
    again = torchrun(REPLICA, str(killed), f"{kind}die", restarts=2)
    assert again.returncode == 0, again.stderr
    assert "dies at" in again.stdout
    wanted = safetensors.torch.load_file(whole / "rank0.safetensors")
    for rank in range(2):
        found = safetensors.torch.load_file(killed / f"rank{rank}.safetensors")
        weights = [key for key in found if " weight " in key or " average " in key]
        assert any("branches.0" in key for key in weights)
        assert all(torch.equal(found[key], wanted[key]) for key in weights)
    if kind == "sharded ":
        alone = run_python(str(REPLICA), str(killed), f"{kind}die", "2")
        assert alone.returncode == 0, alone.stderr[-3000:]
        found = safetensors.torch.load_file(killed / "rank0.safetensors")
        assert all(torch.equal(found[key], wanted[key]) for key in weights), "in one process"
