"""`esper status --bus`: its exit code says whether all is well, and whether anybody serves."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.bus.bus import HEALTH
from esper.bus.envelope import Sealer
from esper.bus.in_process import InProcessBus
from esper.bus.messages import HealthMessage, body_of
from esper.cli import status as status_module
from esper.cli.app import app
from esper.cli.command_line import command_line
from esper.signing import Keyring
from esper.supervision.finding import Finding
from esper.supervision.folder_lock import FolderLock
from esper.supervision.health_reader import SILENT_SECONDS
from esper.supervision.status import (
    BeatStatus,
    ReloadStatus,
    ServeStatus,
    ServiceState,
    ServiceStatus,
    write_status,
)
from esper.telemetry import RunStore

NOW, LONG_AGO = 0.0, SILENT_SECONDS + 60.0


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({}, 3),
        ({"stopped": LONG_AGO, "finished": LONG_AGO}, 3),
        ({"ready": LONG_AGO, "given up": LONG_AGO}, 3),
        ({"stopped": NOW, "finished": NOW}, 0),
        ({"ready": NOW, "finished": LONG_AGO}, 0),
        ({"ready": LONG_AGO, "finished": NOW}, 1),
        ({"ready": NOW, "given up": NOW}, 1),
    ],
    ids=str,
)
def test_the_exit_code_says_how_all_that_a_bus_was_told_of_stands(
    told: dict[str, float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("k" * 32)
    key_file.chmod(0o600)
    ring, bus = Keyring.from_file(key_file), InProcessBus()
    for state, ago in told.items():
        message = HealthMessage(service=f"one {state}", state=state, pid=1, host="here")
        sealer = Sealer(ring, "serve:here", clock=lambda ago=ago: time.time() - ago)
        bus.publish(HEALTH, [sealer.seal(body_of(message))[1]])
    monkeypatch.setattr(status_module, "open_run_bus", lambda _: bus)
    asking = ["status", "--bus", "redis://here", "--key-file", str(key_file), "--json"]
    shown = CliRunner().invoke(app, asking)
    assert shown.exit_code == code, shown.output
    assert len(json.loads(shown.stdout)["services"]) == len(told)


def test_a_folder_of_a_run_is_told_apart_from_one_of_esper_serve(tmp_path: Path) -> None:
    RunStore(tmp_path, config={}, environment={}).close()
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["status", str(tmp_path)])
    assert shown.exit_code == 3
    assert shown.stdout == (
        f"{tmp_path} is the folder of a run, not of esper serve; look at it with: "
        f"{command_line('inspect', tmp_path)}\n"
    )


MARKUP = "[router] of [/tmp/sock] is :key:"


def test_what_programs_and_files_say_is_shown_as_it_is(tmp_path: Path) -> None:
    service = ServiceStatus(
        name="one",
        kind="service",
        state=ServiceState.GIVEN_UP,
        reason=f"reason {MARKUP}",
        since_seconds=time.time(),
        beat=BeatStatus(age_seconds=0.0, state=f"beat {MARKUP}"),
        log=f"log {MARKUP}",
        last_lines=(f"line {MARKUP}",),
    )
    status = ServeStatus(
        time_seconds=time.time(),
        pid=1,
        host="here",
        config=f"config {MARKUP}",
        ending=False,
        services=(service,),
        preflight=(Finding(level="warning", about="bus", text=f"finding {MARKUP}"),),
        reload=ReloadStatus(time_seconds=0.0, done=False, text=f"reload {MARKUP}"),
        bus=f"bus {MARKUP}",
    )
    write_status(status, tmp_path)
    lock = FolderLock(tmp_path)
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["status", str(tmp_path)])
    lock.release()
    assert shown.exit_code == 1, shown.output
    for word in ("reason", "beat", "log", "line", "config", "finding", "reload", "bus"):
        assert f"{word} {MARKUP}" in shown.output


def test_a_bus_that_cannot_be_reached_is_no_mistake_of_who_asks(tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("k" * 32)
    key_file.chmod(0o600)
    asking = ["status", "--bus", "redis://127.0.0.1:1/0", "--key-file", str(key_file)]
    shown = CliRunner().invoke(app, asking)
    assert shown.exit_code == 3, shown.output
    assert shown.output.startswith("reading health failed, redis://127.0.0.1:1/0 is not available")
    told = json.loads(CliRunner().invoke(app, [*asking, "--json"]).stdout)
    assert told["services"] == []
    assert "is not available" in told["problem"]
