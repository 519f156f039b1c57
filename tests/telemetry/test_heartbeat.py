"""A heartbeat tells whoever supervises, and cannot stop or slow what it tells of."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from esper.telemetry.heartbeat import HEARTBEAT_VARIABLE, Heartbeat


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    yield reading, writing
    for end in (reading, writing):
        with suppress(OSError):
            os.close(end)


def beats(reading: int) -> list[Any]:
    try:
        return [json.loads(line) for line in os.read(reading, 1 << 20).splitlines()]
    except BlockingIOError:
        return []


def test_beats_of_one_state_are_a_second_apart_and_another_state_is_told_at_once(
    pipe: tuple[int, int],
) -> None:
    now = 100.0
    heartbeat = Heartbeat(pipe[1], clock=lambda: now)
    heartbeat.ready()
    for step in range(25):
        heartbeat.beat("running", step=step, epoch=1)
        now += 0.125
    heartbeat.beat("paused", step=25)
    told = beats(pipe[0])
    assert [(beat["state"], beat["step"]) for beat in told] == [
        ("ready", None),
        ("running", 0),
        ("running", 8),
        ("running", 16),
        ("running", 24),
        ("paused", 25),
    ]
    assert told[1]["details"] == {"epoch": 1}


def test_a_full_pipe_is_skipped_and_taken_up_again(pipe: tuple[int, int]) -> None:
    now = 0.0
    heartbeat = Heartbeat(pipe[1], clock=lambda: now)
    for _ in range(20_000):
        now += 2.0
        heartbeat.beat("running", text="x" * 100)
    assert len(beats(pipe[0])) < 20_000
    heartbeat.beat("running", step=7)
    assert beats(pipe[0])[-1]["step"] == 7


def test_a_line_is_never_longer_than_a_pipe_takes_at_once(pipe: tuple[int, int]) -> None:
    heartbeat = Heartbeat(pipe[1])
    heartbeat.beat("running", step=3, text="x" * 100_000)
    assert beats(pipe[0]) == [{"state": "running", "step": 3, "details": {}}]


def test_nobody_who_reads_is_no_error(pipe: tuple[int, int]) -> None:
    heartbeat = Heartbeat(pipe[1])
    os.close(pipe[0])
    heartbeat.beat("running")
    assert not heartbeat.is_supervised


def test_the_variable_is_taken_out_of_the_environment(pipe: tuple[int, int]) -> None:
    environment = {HEARTBEAT_VARIABLE: str(pipe[1])}
    assert Heartbeat.from_environment(environment).is_supervised
    assert environment == {}


@pytest.mark.parametrize("named", ["", "x", "²", "-1", "987654", "9" * 30])
def test_what_is_no_pipe_is_not_written_to(named: str) -> None:
    assert not Heartbeat.from_environment({HEARTBEAT_VARIABLE: named}).is_supervised
    assert not Heartbeat.from_environment({}).is_supervised


def test_a_file_that_happens_to_have_the_number_stays_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        heartbeat = Heartbeat.from_environment({HEARTBEAT_VARIABLE: str(file.fileno())})
        heartbeat.beat("running")
    assert (tmp_path / "file").read_text() == ""


def test_a_process_that_a_supervised_one_starts_cannot_beat_for_it(pipe: tuple[int, int]) -> None:
    child = '''
import os, subprocess, sys
from esper.telemetry.heartbeat import Heartbeat
first = Heartbeat.from_environment()
grandchild = """
from esper.telemetry.heartbeat import Heartbeat
Heartbeat.from_environment().beat("grandchild")
"""
subprocess.run([sys.executable, "-c", grandchild], check=True, close_fds=False)
first.beat("child")
'''
    environment = {**os.environ, HEARTBEAT_VARIABLE: str(pipe[1])}
    subprocess.run([sys.executable, "-c", child], check=True, env=environment, pass_fds=[pipe[1]])
    assert [beat["state"] for beat in beats(pipe[0])] == ["child"]
