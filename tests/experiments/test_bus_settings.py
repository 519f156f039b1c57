"""Where a run listens is set once, for whoever goes on with it, and holds no secret."""

from pathlib import Path

import pytest

from esper.experiments.bus_connection import BusConnection
from esper.experiments.config import BusConfig, load_run_config
from esper.experiments.settings import SettingsError
from esper.telemetry import CommandLog, RunReader, RunStore
from esper.training import RunControl


@pytest.mark.parametrize(
    "address",
    [
        "redis://:secret@host:6379/0",
        "redis://me:secret@host/0",
        "redis://host/0?password=secret",
        "redis://host/0?db=1&password=",
    ],
)
@pytest.mark.parametrize("key", ["commands", "telemetry"])
def test_a_password_is_refused_and_not_repeated(key: str, address: str) -> None:
    settings = ["bus.commands=redis://good/0", f"bus.{key}={address}"]
    with pytest.raises(SettingsError, match=f"bus.{key} holds a password") as refused:
        load_run_config("digits", None, settings, {})
    assert "secret" not in str(refused.value)
    assert "ESPER_BUS_PASSWORD" in str(refused.value)


def test_telemetry_alone_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"bus\.telemetry is set, and bus\.commands is not"):
        load_run_config("digits", None, ["bus.telemetry=redis://h/0"], {})


def test_the_key_file_is_the_same_from_wherever_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_run_config("digits", None, ["bus.key_file=keys", "compile.key_file=other"], {})
    assert config.bus.key_file == tmp_path / "keys"
    assert config.compile.key_file == tmp_path / "other"


def test_a_connection_that_could_not_be_opened_can_be_closed(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 32)
    keys.chmod(0o600)
    RunStore(tmp_path / "run", config={"notes": "x" * (1 << 20)}, environment={}).close()
    connection = BusConnection(BusConfig(commands="redis://127.0.0.1:1/0", key_file=keys))
    growth, control = object(), RunControl(CommandLog.in_memory())
    with pytest.raises(ValueError, match="a message holds"):
        connection.open(RunReader(tmp_path / "run"), growth, control, after_step=-1)
    connection.stop_receiving(refuse_rest=False)
    connection.close("failed")
