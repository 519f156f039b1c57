"""The file of `esper serve`: what is wrong is named, what is left out has its default."""

import os
from pathlib import Path

import pytest

from esper.supervision.config import (
    ServeConfigError,
    keys_and_defaults,
    known_keys,
    load_serve_config,
)
from esper.supervision.program import programs

JOB = '[[job]]\nname = "a"\ntask = "digits"\nfolder = "runs/a"\n'
SERVICE = '[[service]]\nname = "s"\ncommand = ["true"]\nready = {port = 1, '


def load(folder: Path, text: str) -> str:
    """Return why a config is refused."""
    (folder / "esper.toml").write_text(text)
    with pytest.raises(ServeConfigError) as error:
        load_serve_config(folder / "esper.toml")
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is nothing to serve"),
        ("folder = ", "is not TOML"),
        (JOB.replace("task", "tusk"), "unknown key 'job[1].tusk'; did you mean 'job.task'?"),
        (JOB + JOB.replace("runs/a", "runs/b"), "these are used again: ['a']"),
        (JOB + JOB.replace('"a"', '"b"'), "each job needs a folder of its own"),
        (JOB.replace('"a"', '"router"'), "['router'] are esper's own"),
        (JOB.replace('"a"', '"../a"'), "job[1].name: String should match pattern"),
        (JOB + "[router]\n", "[router] takes what comes over the bus"),
        (JOB + "[dashboard]\ncommands = true\n", "[dashboard] commands go over the bus"),
        (JOB + "[restart]\nlongest_seconds = 0.5\n", "must not be less than first_seconds"),
        (JOB + "[stop]\ndrain_seconds = -1\n", "stop.drain_seconds: Input should be greater"),
        (
            JOB + '[dashboard]\nhost = ".local"\n',
            "dashboard.host: '.local' is no name of a",
        ),
        (JOB + SERVICE + 'host = "a..b"}\n', "service[1].ready.host: 'a..b' is no name of a"),
        (JOB + "[restart]\nmax_restart = 3\n", "did you mean 'restart.max_restarts'?"),
        (JOB + '[bus]\ncommands = "redis://u:secret@h"\n', "ESPER_BUS_PASSWORD"),
        (JOB + '[bus]\ncommands = "redis://h:99999"\n', "bus: Port out of range"),
        ('[[service]]\nname = "s"\ncommand = []\n', "service[1].command: "),
        ('[[service]]\nname = "s"\n', "service[1].command is missing"),
        ('folder = "~nosuchuser/x"\n' + JOB, "folder: ~nosuchuser/x begins with ~, and there"),
        (JOB.replace("runs/a", r"a\u0000b"), "job[1].folder holds a NUL character"),
        (JOB + r'set = ["a=1", "b=\u0000"]', "job[1].set[2] holds a NUL character"),
        ('[[service]]\nname = "s"\ncommand = ["t\\u0000"]\n', "service[1].command[1] holds a NUL"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, told: str) -> None:
    assert told in load(tmp_path, text)


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    """The status, which is JSON, could not tell of it."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert r"caf\udce9/esper.toml' is no text" in load(folder, JOB)


def test_a_password_is_not_repeated(tmp_path: Path) -> None:
    assert "hidden" not in load(tmp_path, JOB + '[bus]\ncommands = "redis://:hidden@h"\n')


def test_paths_are_meant_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/esper.toml").write_text(
        JOB + '[bus]\ncommands = "redis://h"\nkey_file = "keys"\n[router]\nfolder = "/srv/runs"\n'
    )
    monkeypatch.chdir(tmp_path)
    config = load_serve_config(Path("etc/esper.toml"))
    assert config.folder == tmp_path / "etc/serve"
    assert config.job[0].folder == tmp_path / "etc/runs/a"
    assert config.bus is not None
    assert config.bus.key_file == tmp_path / "etc/keys"
    assert config.router is not None
    assert config.router.folder == Path("/srv/runs")


def test_a_job_is_begun_with_its_settings_and_the_bus(tmp_path: Path) -> None:
    (tmp_path / "esper.toml").write_text(
        JOB + 'config = "settings.toml"\nset = ["trainer.epochs=3"]\n'
        '[bus]\ncommands = "redis://a"\ntelemetry = "redis://b"\nkey_file = "keys"\n'
    )
    (job,) = programs(load_serve_config(tmp_path / "esper.toml"), tmp_path)
    assert job.command[1:] == (
        *("-m", "esper", "grow", "digits", "--config", str(tmp_path / "settings.toml")),
        *("--set", "trainer.epochs=3", "--set", "bus.commands=redis://a"),
        *("--set", "bus.telemetry=redis://b", "--set", f"bus.key_file={tmp_path / 'keys'}"),
        *("--out", str(tmp_path / "runs/a"), "--quiet"),
    )
    assert job.run is not None
    assert job.run.resume[1:] == ("-m", "esper", "resume", str(tmp_path / "runs/a"), "--quiet")
    assert job.silent_seconds == 600.0


def test_every_key_is_listed_once_with_its_default() -> None:
    keys = dict(keys_and_defaults())
    assert list(keys) == known_keys()
    assert keys["restart.max_restarts"] == 5
    assert keys["stop.drain_seconds"] == 10.0
    assert keys["job.set"] == ()
    assert keys["job.task"] is ...
    assert keys["service.ready.port"] is ...
