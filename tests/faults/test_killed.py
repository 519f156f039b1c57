"""A process that is killed at any point of a checkpoint loses one interval at most."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent / "killing.py"
KILLED_STEP, SAVED_STEPS = 8, 2


@cache
def results_of(folder: Path, points: tuple[tuple[str, int], ...]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), json.dumps(points)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(result: dict[str, Any]) -> None:
    assert result["latest"], result
    assert result["left_over"] == [], result
    assert result["same"], result
    assert result["further"] >= 12, result


def test_killed_at_any_file_operation_of_a_checkpoint(tmp_path: Path) -> None:
    """Between the rename and the link to the latest, and while old ones are removed, too."""
    results = results_of(tmp_path, tuple(("operation", number) for number in range(34)))
    killed = [result for result in results if result["killed"]]
    assert len(killed) >= 25, "a checkpoint has at least so many file operations"
    for result in killed:
        check(result)
        assert result["step"] in (KILLED_STEP - SAVED_STEPS, KILLED_STEP), result
    assert {result["step"] for result in killed} == {KILLED_STEP - SAVED_STEPS, KILLED_STEP}


def test_killed_at_any_time_of_a_checkpoint(tmp_path: Path) -> None:
    results = results_of(tmp_path, tuple(("time", number) for number in range(25)))
    for result in results:
        assert result["killed"]
        check(result)
        assert result["step"] >= KILLED_STEP - SAVED_STEPS, result


@pytest.mark.parametrize("number", [0, 1], ids=["before the optimizer knows", "after"])
def test_killed_while_the_structure_changes(number: int, tmp_path: Path) -> None:
    """The third epoch's germination: all of it happens on the way back, or none."""
    (result,) = results_of(tmp_path, (("structure", number),))
    assert result["killed"]
    check(result)
    assert result["step"] == 12
