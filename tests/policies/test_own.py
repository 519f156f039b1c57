"""Policies of one's own, named by their place in Python."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.policies import named_policy
from esper.telemetry.run_reader import RunReader

SOURCE = """
from esper.lifecycle import Germinate


class AtOnce:
    name = "at once"

    def __init__(self):
        self.num_asked = 0

    def decide(self, state):
        self.num_asked += 1
        first = state.slots[0].path
        return [Germinate(slot=first, blueprint="norm")] if self.num_asked == 1 else []

    def state_dict(self):
        return {"num_asked": self.num_asked}

    def load_state_dict(self, state):
        self.num_asked = state["num_asked"]


MADE = AtOnce()


class Nameless:
    def decide(self, state):
        return []


def broken():
    return 1 / 0
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of policies."""
    (tmp_path / "own_policies_of_a_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_policies_of_a_test", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_policies_of_a_test:AtOnce", "did you mean 'python:own_policies_of_a_test:AtOnce'"),
        ("python:own_policies_of_a_test", "policy of one's own is named python:MODULE:NAME"),
        ("python:own_policies_of_a_test:Never", "'Never' in .* is missing"),
        ("python:own_policies_of_a_test:MADE", "is a AtOnce, and must be the class of a policy"),
        ("python:own_policies_of_a_test:Nameless", "makes a Nameless, .* which has a name"),
        ("python:own_policies_of_a_test:broken", "calling it raised ZeroDivisionError"),
        ("python:no_such_module_here:AtOnce", "policy .*: importing .* ModuleNotFoundError"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(place: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        named_policy(name, random_seed=0)


ESPER = (sys.executable, "-m", "esper")


def test_a_run_that_was_killed_goes_on_with_ones_own_policy(place: Path) -> None:
    policy, run = "python:own_policies_of_a_test:AtOnce", place / "run"
    settings = ("--epochs", "60", "--no-report", "--quiet", "--set", "checkpoint.min_seconds=0")
    begun = subprocess.Popen(
        [*ESPER, "grow", "digits", "--policy", policy, "--out", run, *settings]
    )
    deadline = time.monotonic() + 120.0
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert begun.poll() is None
        time.sleep(0.01)
    begun.kill()
    begun.wait()
    subprocess.run([*ESPER, "resume", run, "--no-report", "--quiet"], cwd=place, check=True)
    reader = RunReader(run)
    assert (reader.config()["policy"], reader.status) == (policy, "finished")
    kinds = [record.event.type for record in reader.events()]
    assert (kinds.count("run_resumed"), kinds.count("seed_germinated")) == (1, 1)


def test_a_comparison_makes_ones_own_policy_anew_in_each_process(place: Path) -> None:
    policy = "python:own_policies_of_a_test:AtOnce"
    options = ("--epochs", "1", "--seeds", "2", "--rates", "1", "--no-report", "--quiet")
    compare = ("compare", "digits", "--policy", policy, "--out", "compare", *options)
    subprocess.run([*ESPER, *compare], cwd=place, check=True)
    assert len(list((place / "compare" / "runs").glob("grown*.json"))) == 2
