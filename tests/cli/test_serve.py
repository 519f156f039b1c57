"""`esper serve` and `esper status` as a person types them."""

import json
import re
import signal
from pathlib import Path

import pytest

from supervised import BEATING, SERVE, STATUS, Served, free_port, wait_for

CONFIG = """
[restart]
first_seconds = 0.05
max_restarts = 1
[[service]]
name = "beater"
command = ["PYTHON", "-S", "beating.py"]
silent_seconds = 5
"""
BROKEN = """
[[service]]
name = "broken"
command = ["sh", "-c", "echo there is no such file: weights; exit 3"]
"""

pytestmark = pytest.mark.slow


def test_check_tells_everything_and_starts_nothing(tmp_path: Path) -> None:
    served = Served(tmp_path, CONFIG + BROKEN.replace('"sh"', '"no-such-shell"'), beating=BEATING)
    told = served.run(SERVE, "esper.toml", "--check")
    assert told.returncode == 1
    assert re.findall(r"^(ok|warning|failure) +(\S+ ?\S*) ", told.stdout, re.MULTILINE) == [
        ("ok", "config "),
        ("ok", "service beater"),
        ("failure", "service broken"),
        ("ok", "disk "),
    ]
    assert "there is no program 'no-such-shell'; install it, or give its whole path" in told.stdout
    assert not (tmp_path / "serve").exists()
    served.configure(CONFIG)
    assert served.run(SERVE, "esper.toml", "--check").returncode == 0
    told = served.run(SERVE, "esper.toml", "--check", "--json")
    assert {json.loads(line)["level"] for line in told.stdout.splitlines()} == {"ok"}


def test_a_start_is_refused_where_something_is_wrong(tmp_path: Path) -> None:
    served = Served(tmp_path, CONFIG + BROKEN.replace('"sh"', '"no-such-shell"'), beating=BEATING)
    told = served.run(SERVE, "esper.toml")
    assert told.returncode == 1
    assert "starting" not in told.stdout


def test_a_wrong_file_is_wrong_usage(tmp_path: Path) -> None:
    served = Served(tmp_path, CONFIG.replace("silent_", "silence_"))
    told = served.run(SERVE, "esper.toml")
    assert told.returncode == 2
    assert "did you mean" in told.stderr
    assert served.run(SERVE, "none.toml").returncode == 2


def test_status_shows_what_runs_and_why_not_in_the_width_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Served(tmp_path, CONFIG + BROKEN, beating=BEATING) as served:
        served.wait_for("broken", "given up")
        beater = served.wait_for("beater", "ready")
        wide = served.run(STATUS)
        assert wide.returncode == 1
        assert re.search(
            rf"beater +service +{beater.pid} +ready .*running at step [\d,]+, 0 s ago", wide.stdout
        )
        assert re.search(
            r"broken +service +given up .* 1 .*ended with exit code 3; restarted 1", wide.stdout
        )
        assert "  there is no such file: weights" in wide.stdout

        monkeypatch.setattr(Served, "environment", {**served.environment, "COLUMNS": "80"})
        narrow = served.run(STATUS, "esper.toml")
        table = narrow.stdout.split("\n\n")[1]
        assert table.startswith("name ")
        assert max(map(len, table.splitlines())) <= 80
        assert re.search(r"beater +ready ", narrow.stdout)
        found = json.loads(served.run(STATUS, "serve", "--json").stdout)
        assert found["served"]
        assert [service["state"] for service in found["services"]] == ["ready", "given up"]

        served.configure(CONFIG)
        served.signal(signal.SIGHUP)
        wait_for(lambda: served.service("broken") is None)
        assert served.run(STATUS).returncode == 0

        served.signal(signal.SIGTERM)
        assert served.ended() == 0
        after = served.run(STATUS)
        assert after.returncode == 3
        assert "nobody serves" in after.stdout
        assert re.search(r"beater +stopped ", after.stdout)


def test_status_of_a_supervisor_that_hangs_is_silent(tmp_path: Path) -> None:
    with Served(tmp_path, CONFIG, beating=BEATING) as served:
        served.wait_for("beater", "ready")
        served.signal(signal.SIGSTOP)
        written = served.status
        assert written is not None
        told = wait_for(
            lambda: (done := served.run(STATUS)).returncode == 1 and done.stdout, seconds=30.0
        )
        assert "serves, and was silent for" in told
        served.signal(signal.SIGCONT)
        wait_for(lambda: served.run(STATUS).returncode == 0)
        back = served.service("beater")
        assert back is not None
        assert back.restarts == 0  # its beats came while nobody read them


def test_status_where_nobody_has_served(tmp_path: Path) -> None:
    served = Served(tmp_path, CONFIG)
    told = served.run(STATUS, "nowhere")
    assert (told.returncode, told.stdout) == (
        3,
        "nobody has served in nowhere: it has no status.json\n",
    )
    assert json.loads(served.run(STATUS, "nowhere", "--json").stdout)["served"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        *(("serve", "--bus", "redis://h"), ("--key-file", "keys")),
        *(("--bus", "http://h"), ("--bus", "redis://:hidden@127.0.0.1:1")),
    ],
)
def test_wrong_usage_of_status(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert Served(tmp_path, CONFIG).run(STATUS, *arguments).returncode == 2


def test_status_of_a_bus_that_is_away_says_so(tmp_path: Path) -> None:
    served = Served(tmp_path, CONFIG)
    (tmp_path / "keys").write_text("k" * 32)
    (tmp_path / "keys").chmod(0o600)
    url = f"redis://127.0.0.1:{free_port()}"
    told = served.run(STATUS, "--bus", url, "--key-file", "keys")
    assert told.returncode == 3
    assert "is not available" in told.stdout
