"""Tasks of one's own, found by their place in Python."""

import subprocess
import sys
from pathlib import Path

import pytest

from esper.tasks import named_task
from esper.tasks.digits import DIGITS

SOURCE = """
from dataclasses import replace
from esper.tasks.digits import DIGITS

MINE = replace(DIGITS, name="mine", summary="Digits again")
NOT_A_TASK = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of tasks."""
    (tmp_path / "own_tasks_of_a_test.py").write_text(SOURCE)
    (tmp_path / "own_broken_test.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_tasks_of_a_test", raising=False)
    return tmp_path


def test_a_task_is_found_in_the_working_directory_and_keeps_its_address(place: Path) -> None:
    task = named_task("python:own_tasks_of_a_test:MINE")
    assert task.name == "python:own_tasks_of_a_test:MINE", "by which another process finds it"
    assert task.summary == "Digits again"
    assert task.build is DIGITS.build


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:own_tasks_of_a_test", "is named python:MODULE:NAME"),
        ("python::MINE", "is named python:MODULE:NAME"),
        ("python:own_tasks_of_a_test:YOURS", "'YOURS' in .* is missing.*tasks there: .*MINE"),
        ("python:own_tasks_of_a_test:NOT_A_TASK", "is a int"),
        ("python:no_such_module_here:MINE", "ModuleNotFoundError"),
        ("python:own_broken_test:MINE", "ZeroDivisionError"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(place: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        named_task(name)


def test_a_comparison_of_ones_own_task_runs_in_its_processes(place: Path) -> None:
    command = [sys.executable, "-m", "esper", "compare", "python:own_tasks_of_a_test:MINE"]
    options = ["--epochs", "1", "--seeds", "2", "--rates", "1", "--out", "compare", "--quiet"]
    subprocess.run([*command, *options], cwd=place, check=True)
    assert len(list((place / "compare" / "runs").glob("*.json"))) == 4
