"""Real training under `esper serve`, with real servers, router and dashboard."""

import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from esper.telemetry import RunReader
from redis_server import NO_SERVER, PROGRAM
from supervised import (
    WAIT_SECONDS,
    Served,
    command_line,
    free_port,
    processes_with,
    wait_for,
)

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=NO_SERVER),
]

CONFIG = """
[bus]
commands = "redis://127.0.0.1:COMMANDS/0"
telemetry = "redis://127.0.0.1:TELEMETRY/0"
key_file = "keys"
[dashboard]
folder = "mirrors"
port = DASHBOARD
[router]
folder = "mirrors"
[restart]
first_seconds = 0.1
[[service]]
name = "redis-commands"
command = ["redis-server", "--port", "COMMANDS", "--bind", "127.0.0.1", "--dir", "commands",
           "--appendonly", "yes", "--appendfsync", "always"]
ready = {port = COMMANDS}
[[service]]
name = "redis-telemetry"
command = ["redis-server", "--port", "TELEMETRY", "--bind", "127.0.0.1", "--dir", "telemetry",
           "--save", "", "--appendonly", "yes"]
ready = {port = TELEMETRY}
[[job]]
name = "digits"
task = "digits"
folder = "runs/long"
set = ["trainer.epochs=300", "checkpoint.min_seconds=0", "count_flops=false"]
[[job]]
name = "endless"
task = "digits"
folder = "runs/endless"
set = ["trainer.epochs=100000", "checkpoint.min_seconds=0", "count_flops=false"]
"""


def steps(served: Served, name: str) -> int:
    service = served.service(name)
    beat = None if service is None else service.beat
    return 0 if beat is None else beat.step or 0


def status_of(run: Path) -> str | None:
    return RunReader(run).status if (run / "run.sqlite").exists() else None


def test_jobs_train_are_shown_stopped_by_command_drained_and_go_on_after_a_restart(
    tmp_path: Path,
) -> None:
    ports = {name: free_port() for name in ("COMMANDS", "TELEMETRY", "DASHBOARD")}
    config = CONFIG
    for name, port in ports.items():
        config = config.replace(name, str(port))
    for folder in ("commands", "telemetry"):
        (tmp_path / folder).mkdir()
    (tmp_path / "keys").write_text("k" * 40)
    (tmp_path / "keys").chmod(0o600)
    runs, mirrors = tmp_path / "runs", tmp_path / "mirrors"
    url = f"http://127.0.0.1:{ports['DASHBOARD']}/api/runs"

    def shown() -> set[Any]:
        return {row["id"] for row in httpx.get(url).json()["rows"]}

    def mirrored(name: str) -> str | None:
        """Return the name of a run's mirror: its id."""
        return next((folder.name for folder in mirrors.glob(f"{name}-*")), None)

    with Served(tmp_path, config) as served:
        for name in ("router", "dashboard", "digits", "endless"):
            served.wait_for(name, "ready")
        order = [told["about"] for told in served.notices if told.get("state") == "ready"]
        assert order[:2] == ["redis-commands", "redis-telemetry"]
        assert set(order[2:4]) == {"router", "dashboard"}
        wait_for(lambda: steps(served, "digits") > 20)
        wait_for(lambda: mirrored("long") and mirrored("endless"))
        wait_for(lambda: shown() == {mirrored("long"), mirrored("endless")})

        done = served.run("send", "runs/endless", "stop")
        assert done.returncode == 0, done.stderr
        stopped = served.wait_for("endless", "stopped")
        assert stopped.last_exit == "exit code 0"

        served.signal(signal.SIGTERM)
        assert served.ended() == 0
        assert processes_with(served.mark) == []
        assert status_of(runs / "long") == "interrupted"
        assert list((runs / "long/checkpoints").iterdir())
        job = next(s for s in served.status.services if s.name == "digits")
        assert job.last_exit == "exit code 143"

        served.start()
        back = wait_for(
            lambda: (s := served.service("digits")) and s.pid and s.state == "ready" and s
        )
        assert " resume " in command_line(back.pid)
        served.wait_for("endless", "stopped")
        served.wait_for("digits", "finished", 3 * WAIT_SECONDS)
        assert status_of(runs / "long") == "finished"
        wait_for(lambda: status_of(mirrors / (mirrored("long") or "")) == "finished")
        assert status_of(runs / "endless") == "stopped"
        assert RunReader(runs / "long").attempt == 2
        served.signal(signal.SIGTERM)
        assert served.ended() == 0
    assert processes_with(served.mark) == []
