"""The examples of `esper serve` are what systemd, compose and esper itself take."""

import configparser
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper.supervision.config import load_serve_config
from esper.supervision.program import programs
from redis_server import NO_SERVER, PROGRAM
from supervised import Served, free_port

FOLDER = Path(__file__).parent.parent / "examples/serve"

UNIT_KEYS = {
    "Unit": {"Description", "Wants", "After"},
    "Service": {
        *("Type", "User", "Group", "WorkingDirectory", "Environment", "EnvironmentFile"),
        *("ExecStart", "ExecReload", "KillMode", "TimeoutStopSec"),
        *("Restart", "RestartSec", "RestartPreventExitStatus", "UMask"),
        *("NoNewPrivileges", "PrivateTmp", "ProtectSystem", "ProtectHome", "ReadWritePaths"),
    },
    "Install": {"WantedBy"},
}
COMPOSE_KEYS = {"name", "services", "configs", "secrets", "volumes"}
SERVICE_KEYS = {
    *("image", "build", "command", "init", "restart", "stop_grace_period", "depends_on"),
    *("environment", "configs", "secrets", "volumes", "ports", "healthcheck"),
}


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(FOLDER / "esper.service")
    return parser


def compose() -> Any:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_the_unit_has_the_keys_that_systemd_knows_and_ends_what_it_should() -> None:
    parser = unit()
    assert {name: set(parser[name]) for name in parser.sections()} == UNIT_KEYS
    service = parser["Service"]
    assert service["KillMode"] == "mixed"  # else all jobs were asked to end before esper knows
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    drain = load_serve_config(FOLDER / "esper.toml").stop.drain_seconds
    steps = len({program.kind for program in served_programs()}) + 1  # two servers, one by one
    assert int(service["TimeoutStopSec"]) > drain * steps


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (FOLDER / "esper.service").read_text()
    program = shutil.which("true")
    (tmp_path / "esper.service").write_text(text.replace("/opt/esper/bin/esper", str(program)))
    told = subprocess.run(
        [str(shutil.which("systemd-analyze")), "verify", str(tmp_path / "esper.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")


def served_programs() -> list[Any]:
    return programs(load_serve_config(FOLDER / "esper.toml"), FOLDER)


def test_the_file_is_taken_and_runs_all_kinds() -> None:
    kinds = [program.kind for program in served_programs()]
    assert kinds == ["service", "service", "router", "dashboard", "job"]


def test_compose_has_the_keys_that_it_knows_and_names_only_what_is_there() -> None:
    document = compose()
    plain = {key for key in document if not key.startswith("x-")}
    assert plain == COMPOSE_KEYS
    for name, service in document["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert ("image" in service) != ("build" in service)
    esper = document["services"]["esper"]
    assert set(esper["depends_on"]) <= set(document["services"])
    assert set(esper["secrets"]) <= set(document["secrets"])
    assert {config["source"] for config in esper["configs"]} <= set(document["configs"])
    for name in ("commands", "telemetry"):
        (volume,) = document["services"][name]["volumes"]
        assert volume.partition(":")[0] in document["volumes"]
        policy = document["services"][name]["command"]
        assert policy[policy.index("--maxmemory-policy") + 1] == "noeviction"
    commands = document["services"]["commands"]["command"]
    assert commands[commands.index("--appendfsync") + 1] == "always"
    assert esper["init"] is True


def test_the_config_inside_compose_is_taken_and_its_servers_are_there(tmp_path: Path) -> None:
    document = compose()
    (tmp_path / "esper.toml").write_text(document["configs"]["esper"]["content"])
    config = load_serve_config(tmp_path / "esper.toml")
    assert config.bus is not None
    for url in (config.bus.commands, config.bus.telemetry_url):
        assert url.removeprefix("redis://").partition(":")[0] in document["services"]
    secrets = {f"/run/secrets/{name}" for name in document["services"]["esper"]["secrets"]}
    assert config.dashboard is not None
    assert {str(config.bus.key_file), str(config.dashboard.token_file)} == secrets


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=NO_SERVER)
def test_the_example_trains_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    text = (FOLDER / "esper.toml").read_text().replace("epochs=30", "epochs=2")
    for port in ("6379", "6380", "8265"):
        assert port in text
        text = text.replace(port, str(free_port()))
    with Served(tmp_path, text) as served:
        served.wait_for("digits", "finished")
        assert [told["level"] for told in served.notices if "level" in told].count("failure") == 0
        served.process.terminate()
        assert served.ended() == 0
        texts = [told["text"] for told in served.notices if told.get("text")]
        assert not [text for text in texts if text.startswith(("warning", "failure"))]
