"""`esper send`: a run in another process is told what to do, over a real server."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.bus.messages import RunMessage
from esper.bus.mirror import Mirror
from esper.lifecycle.actions import Prune
from esper.lifecycle.commands import Act
from esper.telemetry.run_folder import is_written
from esper.telemetry.run_reader import RunReader
from redis_server import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.slow]

BY_HAND = ("--policy", "none", "--epochs", "100000", "--set", "checkpoint.min_seconds=100000")
"""Only commands grow anything, the run never ends by itself, and only commands keep it."""


def esper(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esper", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1"},
    )


class Job:
    """`esper grow` or `esper resume`, until it trains."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "esper", *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1"},
        )
        self.output = ""
        self._trains = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._trains.wait(60), self.output
        assert self.process.poll() is None, self.output

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if re.match(r"epoch \d", line) or line.startswith("paused"):
                self._trains.set()
        self._trains.set()

    def end(self, with_signal: int | None = None) -> tuple[int, str]:
        """Wait for the end, and return its code and all that was printed."""
        if with_signal is not None:
            self.process.send_signal(with_signal)
        code = self.process.wait(timeout=60)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code, self.output


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(fsync="always") as started:
        yield started


@pytest.fixture
def job(server: RedisServer, tmp_path: Path) -> Iterator[Job]:
    address = ("--set", f"bus.commands={server.url}")
    started = Job("grow", "digits", *BY_HAND, *address, "--out", "run", cwd=tmp_path)
    yield started
    started.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One with a run that goes on."""
    folder = tmp_path_factory.mktemp("sent")
    address = ("--set", f"bus.commands={server.url}")
    started = Job("grow", "digits", *BY_HAND, *address, "--out", "run", cwd=folder)
    yield folder
    started.end(signal.SIGKILL)


def told(folder: Path) -> list[Any]:
    events = [record.event for record in RunReader(folder).events()]
    return [event for event in events if event.type.startswith("command_")]


def germinated(folder: Path) -> list[tuple[int, int]]:
    """Return where in the run anything germinated, by what the folder holds now."""
    records = RunReader(folder).events()
    return [(r.step, r.epoch) for r in records if r.event.type == "seed_germinated"]


def test_a_live_run_does_what_it_is_told(job: Job, tmp_path: Path) -> None:
    def send(*words: str) -> tuple[int, str]:
        done = esper("send", "run", *words, "--sender", "ann", cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    code, text = send("pause")
    assert code == 0
    step = re.search(r"paused after step (\d+)", text)
    assert step is not None
    code, text = send("germinate", "stage1", "conv_light")
    assert code == 0, text
    assert f"step {step[1]}: conv_light germinated in stage1" in text, "it waits, and obeys"
    code, text = send("germinate", "stage1", "conv_light")
    assert code == 1
    assert "germinate is not legal for slot 'stage1'" in text
    code, text = send("commit", "stage1")
    assert code == 1
    assert "commit is not legal" in text
    assert send("prune", "stage1", "--set", "reason=2024", "--set", "over_steps=1_0")[0] == 0
    asked = told(tmp_path / "run")[-1].command
    assert asked == Act(action=Prune(slot="stage1", reason="2024", over_steps=10))
    assert send("resume")[0] == 0
    code, text = send("checkpoint")
    assert code == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()]
    code, text = send("stop")
    assert code == 0
    code, output = job.end()
    assert code == 0
    assert "stopped by ann after step" in output
    assert "resume run" in output
    assert RunReader(tmp_path / "run").status == "stopped"
    events = told(tmp_path / "run")
    assert {event.sender for event in events} == {"ann"}
    assert [event.type.removeprefix("command_") for event in events] == [
        *("carried_out", "carried_out", "refused", "refused"),
        *("carried_out", "carried_out", "carried_out", "carried_out"),
    ]
    done = esper("send", "run", "pause", cwd=tmp_path)
    assert done.returncode == 2
    assert "no process trains run now, it is stopped" in done.stderr


def test_a_run_elsewhere_is_sent_to_by_its_mirror_that_nobody_writes(
    folder: Path, tmp_path: Path
) -> None:
    config = RunReader(folder / "run").config()
    mirror = Mirror(tmp_path / "run", RunMessage(config=config, environment={}, after_step=-1))
    mirror.close()
    assert esper("send", "run", "pause", "--wait", "0.1", cwd=tmp_path).returncode == 3
    mirror = Mirror(tmp_path / "run")
    mirror.set_status("failed")
    mirror.close()
    done = esper("send", "run", "pause", cwd=tmp_path)
    assert done.returncode == 2
    assert "it is failed" in done.stderr
    assert "go on with" not in done.stderr


def test_what_was_answered_outlives_a_kill(job: Job, tmp_path: Path) -> None:
    """No checkpoint knows of the seed, nor of the pause, when the process is killed."""
    assert esper("send", "run", "checkpoint", cwd=tmp_path).returncode == 0
    assert esper("send", "run", "pause", cwd=tmp_path).returncode == 0
    assert esper("send", "run", "germinate", "stage2", "conv_light", cwd=tmp_path).returncode == 0
    job.end(signal.SIGKILL)
    before = germinated(tmp_path / "run")
    assert len(before) == 1
    again = Job("resume", "run", cwd=tmp_path)
    try:
        assert "paused, as it was told to be" in again.output
        assert esper("send", "run", "resume", cwd=tmp_path).returncode == 0
        ends = time.monotonic() + 60
        while not germinated(tmp_path / "run") and time.monotonic() < ends:
            time.sleep(0.05)
        assert esper("send", "run", "stop", cwd=tmp_path).returncode == 0
        assert again.end()[0] == 0
    finally:
        again.end(signal.SIGKILL)
    assert germinated(tmp_path / "run") == before


def test_sigterm_ends_a_run_that_can_go_on(job: Job, tmp_path: Path) -> None:
    began = time.monotonic()
    code, output = job.end(signal.SIGTERM)
    assert time.monotonic() - began < 10
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in output
    assert RunReader(tmp_path / "run").status == "interrupted"
    assert not is_written(tmp_path / "run")
    step = re.search(r"after step (\d+)", output)
    assert step is not None
    assert (tmp_path / f"run/checkpoints/step-{int(step[1]):010d}").is_dir()


def test_the_answer_as_json(folder: Path) -> None:
    done = esper("send", "run", "resume", "--json", cwd=folder)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["outcome"] == {"done": False, "text": "the run was not paused"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "dance"), "no command 'dance'; commands: germinate SLOT BLUEPRINT"),
        (("run", "germinate", "stage1"), "germinate takes SLOT BLUEPRINT, got stage1"),
        (("run", "pause", "now"), "pause takes nothing further"),
        (("run", "prune", "a", "--set", "over_steps=-1"), "over_steps: Input should be greater"),
        (("run", "prune", "a", "--set", "over_step=1"), "did you mean 'over_steps'?"),
        (("run", "prune", "a", "--set", "over_steps"), "a setting is key=value, got 'over_steps'"),
        (("run", "prune", "a", "--set", "slot=b"), "prune SLOT has the slot already, got slot=b"),
        (
            ("run", "advance", "a", "--set", "operation=prune"),
            "advance SLOT has the operation already, got operation=prune",
        ),
        (
            ("run", "germinate", "a", "b", "--set", "options.x=[1.0, nan]"),
            "options.x=[1.0, nan] holds a number that is not finite",
        ),
        (("elsewhere", "pause"), "elsewhere is no run folder"),
        (("run", "pause", "--bus", "http://x"), "begins with redis://"),
        (("run", "pause", "--bus", "redis://:hidden@h"), "set the environment variable ESPER_BUS_"),
        (("run", "pause", "--sender", 201 * "x"), "has 1 to 200 characters, got 201"),
    ],
    ids=[
        "command",
        "arguments",
        "too many",
        "value",
        "field",
        "setting",
        "word",
        "operation",
        "not finite",
        "folder",
        "address",
        "password",
        "sender",
    ],
)
def test_what_cannot_be_sent_says_why(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = esper("send", *arguments, cwd=folder)
    assert done.returncode == 2
    assert message in re.sub(r"\s*│\s*", " ", done.stderr)
