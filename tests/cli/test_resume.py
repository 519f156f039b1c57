"""`esper resume`: a run that was killed for real goes on as if nothing had happened."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SETTINGS = ("digits", "--epochs", "14", "--set", "checkpoint.min_seconds=0")
WALL_CLOCK = {"prewarm_ms", "seconds"}
ONLY_THERE = {"run_resumed", "checkpoint_saved", "caches_swept"}
"""Events that tell of the stop itself, of the disk, or of a process's own caches."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "esper", *arguments]


def run_esper(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "COLUMNS": "300"},
    )


def story(folder: Path) -> tuple[list[Any], list[Any]]:
    """Return events and metrics, times apart."""
    database = sqlite3.connect(folder / "run.sqlite")
    rows = database.execute("SELECT record FROM events ORDER BY id").fetchall()
    events = []
    for (text,) in rows:
        record = json.loads(text)
        event = {key: v for key, v in record["event"].items() if key not in WALL_CLOCK}
        if event["type"] not in ONLY_THERE:
            events.append((record["epoch"], record["step"], event))
    metrics = database.execute(
        "SELECT epoch, step, name, value FROM metrics "
        "WHERE name NOT IN ('step_seconds', 'flops') ORDER BY id"
    ).fetchall()
    return events, metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, and one that was killed in the middle of its seeds' lives."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_esper("grow", *SETTINGS, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    arguments = command("grow", *SETTINGS, "--out", "killed", "--json")
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if '"epoch": 9' in line:
                break
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    return folder


def test_a_killed_run_goes_on_to_the_same_weights_events_and_metrics(folder: Path) -> None:
    assert "killed" in run_esper("inspect", "killed", cwd=folder).stdout
    done = run_esper("resume", "killed", "--control", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.match(r" +epoch \d+: goes on from checkpoint step-0+\d+0\n", done.stdout)
    assert "the same host without growth" in done.stdout
    assert "host alone" in done.stdout
    assert "epoch 14/14" in done.stdout
    weights = [
        (folder / run / "grown/model.safetensors").read_bytes() for run in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
    assert story(folder / "whole") == story(folder / "killed")
    assert "finished" in run_esper("inspect", "killed", cwd=folder).stdout
    again = run_esper("resume", "killed", cwd=folder)
    assert again.returncode == 2
    assert "nothing to resume" in again.stderr


def test_a_run_without_a_checkpoint_begins_anew(folder: Path) -> None:
    arguments = command("grow", "digits", "--epochs", "4", "--out", "early", "--json")
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if '"epoch": 2' in line:
                break
        process.send_signal(signal.SIGKILL)
    done = run_esper("resume", "early", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no checkpoint was made yet: the run begins anew")
    events, _ = story(folder / "early")
    assert [event["type"] for _, _, event in events].count("run_started") == 1


def test_a_run_that_goes_on_still_is_left_alone(folder: Path) -> None:
    arguments = command("grow", *SETTINGS, "--out", "busy", "--json")
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        refused = run_esper("resume", "busy", cwd=folder)
        process.kill()
    assert refused.returncode == 2
    assert "busy is being written by another process" in refused.stderr


def test_damaged_checkpoints_are_told_and_nothing_is_begun_anew(folder: Path) -> None:
    arguments = command("grow", *SETTINGS, "--out", "damaged", "--json")
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    for state in (folder / "damaged" / "checkpoints").glob("step-*/state.json"):
        state.write_text("{}")
    (folder / "damaged" / "checkpoints" / "step-0000000999").mkdir(parents=True)
    done = run_esper("resume", "damaged", cwd=folder)
    assert done.returncode == 2
    assert "has no checkpoint to go on from" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_is_no_run_is_refused(name: str, folder: Path) -> None:
    done = run_esper("resume", name, cwd=folder)
    assert done.returncode == 2
    assert "is no run folder" in done.stderr
