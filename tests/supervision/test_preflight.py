"""Everything that is wrong is told before anything is started, all at once and by name."""

import shutil
import socket
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.supervision.config import load_serve_config
from esper.supervision.finding import Finding
from esper.supervision.folder_lock import is_served
from esper.supervision.preflight import preflight
from redis_server import NO_SERVER, PROGRAM, RedisServer
from supervised import free_port

SLEEPER = '[[service]]\nname = "sleeper"\ncommand = ["sleep", "1"]\n'

needs_redis = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=NO_SERVER)


def found(folder: Path, text: str, *, served: bool = False) -> list[Finding]:
    (folder / "esper.toml").write_text(text)
    config = load_serve_config(folder / "esper.toml")
    return preflight(config, folder, already_served=served)


def bad(folder: Path, text: str) -> list[tuple[str, str, str]]:
    findings = found(folder, text)
    return [(one.level, one.about, one.text) for one in findings if one.level != "ok"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("k" * 32)
    file.chmod(0o600)
    return file


def test_nothing_wrong_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert bad(tmp_path, SLEEPER) == []


def test_several_failures_are_told_at_once(tmp_path: Path) -> None:
    """A program that is not there, keys that others may read, a server that is away, a port."""
    (tmp_path / "keys").write_text("k" * 32)
    (tmp_path / "keys").chmod(0o644)
    away = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        findings = bad(
            tmp_path,
            f'[bus]\ncommands = "redis://127.0.0.1:{away}"\nkey_file = "keys"\n'
            '[[service]]\nname = "missing"\ncommand = ["no-such-program"]\n'
            f"ready = {{port = {taken.getsockname()[1]}}}\n",
        )
    failures = [(about, text) for level, about, text in findings if level == "failure"]
    expected = [
        ("service missing", "there is no program 'no-such-program'"),
        ("keys", "can be read by others; make it yours: chmod 600"),
        ("bus commands", f"127.0.0.1:{away}"),
        ("service missing", "Address already in use"),
    ]
    assert [about for about, _ in failures] == [about for about, _ in expected]
    for (_, text), (_, told) in zip(failures, expected, strict=True):
        assert told in text


@pytest.mark.parametrize(
    ("text", "about", "told"),
    [
        ('[[service]]\nname = "s"\ncommand = ["no-such"]\n', "service s", "no program 'no-such'"),
        ('[[service]]\nname = "s"\ncommand = ["./none"]\n', "service s", "no program './none'"),
        (
            '[[job]]\nname = "a"\ntask = "digit"\nfolder = "r"\n',
            "job a",
            "did you mean",
        ),
        (
            '[[job]]\nname = "a"\ntask = "digits"\nfolder = "r"\nset = ["trainer.epoch=3"]\n',
            "job a",
            "did you mean 'trainer.epochs'?",
        ),
        (
            '[[job]]\nname = "a"\ntask = "digits"\nfolder = "r"\nset = ["device=cuda:7"]\n',
            "job a",
            "device cuda:7 cannot be used: ",
        ),
        ('[dashboard]\nport = PORT\ntoken_file = "none"\n', "dashboard", "No such file"),
        ('[dashboard]\nhost = "no.such.host.invalid"\n', "dashboard", "port 8265 of no.such"),
    ],
)
def test_each_failure_is_named(tmp_path: Path, text: str, about: str, told: str) -> None:
    text = text.replace("PORT", str(free_port()))
    findings = [finding for finding in bad(tmp_path, text) if finding[0] == "failure"]
    assert [one[1] for one in findings] == [about]
    assert told in findings[0][2]


def test_a_port_that_is_taken_is_a_failure_unless_it_is_served_now(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = SLEEPER + f"ready = {{port = {taken.getsockname()[1]}}}\n"
        ((level, about, told),) = bad(tmp_path, text)
        assert (level, about) == ("failure", "service sleeper")
        assert "Address already in use; end what has it, or choose another" in told
        assert {finding.level for finding in found(tmp_path, text, served=True)} == {"ok"}


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("file/serve", "Not a directory"), (300 * "x" + "/serve", "File name too long")],
    ids=["file", "name"],
)
def test_a_folder_that_cannot_be_written_is_a_failure(
    folder: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (finding,) = bad(tmp_path, f'folder = "{folder}"\n{SLEEPER}')
    assert finding[:2] == ("failure", "folder")
    assert f"cannot be written: {problem}" in finding[2]
    assert not is_served(tmp_path / folder)


def test_a_disk_that_is_nearly_full_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 – as shutil's own
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    ((level, about, told),) = bad(tmp_path, SLEEPER)
    assert (level, about) == ("warning", "disk")
    assert told.startswith("1.0 GB free at ")


def test_keys_that_are_too_short_are_a_failure(tmp_path: Path, keys: Path) -> None:
    keys.write_text("short")
    text = f'{SLEEPER}[bus]\ncommands = "unix:///none"\nkey_file = "keys"\n'
    told = {about: text for _, about, text in bad(tmp_path, text)}
    assert "must have 24 or more" in told["keys"]


def test_a_dashboard_for_others_without_a_token_of_its_own_is_a_warning(tmp_path: Path) -> None:
    ((level, about, told),) = bad(
        tmp_path, f'[dashboard]\nhost = "0.0.0.0"\nport = {free_port()}\n'
    )
    assert (level, about) == ("warning", "dashboard")
    assert "token" in told


@pytest.fixture
def servers() -> Iterator[tuple[RedisServer, RedisServer]]:
    with RedisServer(fsync="always") as commands, RedisServer() as telemetry:
        yield commands, telemetry


@pytest.mark.redis
@needs_redis
def test_servers_that_are_set_up_as_they_should_be_are_fine(
    tmp_path: Path, keys: Path, servers: tuple[RedisServer, RedisServer]
) -> None:
    bus = f'[bus]\ncommands = "{servers[0].url}"\ntelemetry = "{servers[1].url}"\nkey_file = "keys"'
    assert bad(tmp_path, f"{SLEEPER}{bus}\n") == []


@pytest.mark.redis
@needs_redis
def test_one_server_for_all_that_may_lose_commands_is_two_warnings(
    tmp_path: Path, keys: Path, servers: tuple[RedisServer, RedisServer]
) -> None:
    """Another database of the same server is no other server."""
    url = servers[1].url
    bus = f'[bus]\ncommands = "{url}/0"\ntelemetry = "{url}/1"\nkey_file = "keys"'
    findings = bad(tmp_path, f"{SLEEPER}{bus}\n")
    assert [one[:2] for one in findings] == [("warning", "bus commands"), ("warning", "bus")]
    assert "appendfsync always" in findings[0][2]
    assert "one server takes commands and telemetry" in findings[1][2]


def test_a_server_that_is_a_service_of_its_own_is_not_asked_before_it_runs(
    tmp_path: Path, keys: Path
) -> None:
    port = free_port()
    findings = found(
        tmp_path,
        f'[bus]\ncommands = "redis://localhost:{port}/0"\nkey_file = "keys"\n'
        f'[[service]]\nname = "redis"\ncommand = ["sleep", "1"]\nready = {{port = {port}}}\n',
    )
    told = {finding.about: finding for finding in findings}
    assert told["bus commands"].text == "service redis will serve it"
    assert "failure" not in {finding.level for finding in findings}
