"""On a full disk training goes on, the old checkpoint stays, and nothing half written is left."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


def test_training_goes_on_and_the_old_checkpoint_stays(small_disk: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "faults" / "filling.py"), str(small_disk)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    names = {epoch: f"step-{16 * epoch:010d}" for epoch in range(1, 7)}
    assert told["failed"] == [names[3], names[4]]
    assert all("No space left" in error for error in told["errors"])
    assert told["saved"] == [names[1], names[2], names[5], names[6]], "6 epochs were trained"
    assert told["there"] == ["latest", names[6]], "nothing half written is left"
    assert told["newest"] == 96
