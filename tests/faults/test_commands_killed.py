"""Whatever dies while commands are on their way, each takes effect exactly once."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from commanded import effect
from esper.lifecycle.commands import Outcome
from esper.telemetry.command_log import AlreadySettledError, CommandLog, Place
from processes import TESTS
from redis_server import RedisServer

DRIVER = Path(__file__).parent / "commanding.py"
ROUNDS, TRIALS = 4, 250
"""A thousand in all; a run that remembers thousands of commands begins slowly."""


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_at_any_point_of_a_command(seed: int, tmp_path: Path) -> None:
    with RedisServer(fsync="always") as server:
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(tmp_path), server.url, str(TRIALS), str(seed)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["killed"] == TRIALS
    assert (result["lost"], result["doubled"]) == (0, 0), result
    assert result["in order"]
    assert result["given up"] == []


def test_two_processes_race_for_the_same_commands(tmp_path: Path) -> None:
    """Both have received each command, as where one took it over that still worked on it."""
    file, ids = tmp_path / "log.sqlite", [f"id-{number}" for number in range(1_000)]
    with CommandLog.open(file) as log:
        log._database.execute("PRAGMA journal_mode=WAL")
        log._database.execute("CREATE TABLE effects (name TEXT)")
        for id_ in ids:
            log.receive(id_, "test", effect(id_), received_seconds=0.0)
    together = multiprocessing.get_context("fork").Barrier(2)
    children = [_forked(lambda: _settle_all(file, ids, together)) for _ in range(2)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 0]
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT name FROM effects").fetchall()
    assert [name for (name,) in rows] == ids


def _settle_all(file: Path, ids: list[str], together: Barrier) -> None:
    with CommandLog.open(file) as log:
        for id_ in ids:
            together.wait(60.0)
            with suppress(AlreadySettledError), log.settling(id_, Place(0, 0)) as outcomes:
                log._database.execute("INSERT INTO effects VALUES (?)", (id_,))
                outcomes.append(Outcome(done=True, text="done"))


def _forked(run: object) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    return child
