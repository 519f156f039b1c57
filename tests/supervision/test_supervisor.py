"""`esper serve` with real processes: it boots them, brings them back, and leaves none behind."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from esper.supervision.status import ServiceStatus
from redis_server import NO_SERVER, PROGRAM, RedisServer
from supervised import (
    BEATING,
    HELD,
    SERVE,
    STATUS,
    STUBBORN,
    Holders,
    Served,
    command_line,
    free_port,
    processes_with,
    wait_for,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/environ").exists(), reason="processes are found in /proc"
    ),
]

QUICK = """
[restart]
first_seconds = 0.05
longest_seconds = 0.2
max_restarts = 3
[stop]
drain_seconds = 1
"""
BEATER = """
[[service]]
name = "beater"
command = ["PYTHON", "-S", "beating.py"]
silent_seconds = 1
"""
STUBBORN_SERVICE = """
[[service]]
name = "stubborn"
command = ["PYTHON", "-S", "stubborn.py"]
"""


def gone(served: Served) -> Callable[[], bool]:
    """Return whether nothing is left, the process that has no environment included."""
    bare = served.folder / "bare"

    def is_gone() -> bool:
        left = bare.exists() and Path(f"/proc/{bare.read_text()}/exe").exists()
        return not left and not processes_with(served.mark)

    return is_gone


def test_boots_in_order_each_when_what_it_needs_is_ready_and_drains_in_reverse(
    tmp_path: Path,
) -> None:
    slow = """
import signal, socket, sys, time
time.sleep(0.3)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(1000)
"""
    config = (
        """
[[service]]
name = "first"
command = ["PYTHON", "-S", "slow.py", "PORT"]
ready = {port = PORT}
"""
        + BEATER
    )
    with Served(
        tmp_path, QUICK + config.replace("PORT", str(free_port())), slow=slow, beating=BEATING
    ) as served:
        status = served.wait_for("beater", "ready")
        assert status.pid is not None
        assert "beating.py" in command_line(status.pid)
        order = [(told["about"], told["state"]) for told in served.notices if told.get("state")]
        assert order == [
            ("first", "starting"),
            ("beater", "waiting"),
            ("first", "ready"),
            ("beater", "starting"),
            ("beater", "ready"),
        ]
        served.signal(signal.SIGTERM)
        assert served.ended() == 0
        order = [(told["about"], told["state"]) for told in served.notices if told.get("state")]
        assert order[5:] == [
            ("beater", "stopping"),
            ("beater", "stopped"),
            ("first", "stopping"),
            ("first", "stopped"),
        ]
        first = served.service("first")
        assert first is not None
        assert first.last_exit == "exit code 0"
        wait_for(gone(served), seconds=5.0)


def test_one_that_is_killed_comes_back_after_a_while(tmp_path: Path) -> None:
    with Served(tmp_path, QUICK + BEATER, beating=BEATING) as served:
        pid = served.wait_for("beater", "ready").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        back = ready_again(served, "beater")
        assert back.pid != pid
        assert back.last_exit == "signal 9 (SIGKILL)"
        assert served.states("beater")[2:] == ["backing off", "starting", "ready"]


def test_one_that_dies_again_and_again_is_given_up_with_what_it_said(tmp_path: Path) -> None:
    config = """
[[service]]
name = "broken"
command = ["sh", "-c", "echo first; echo no such table: seeds >&2; exit 3"]
"""
    with Served(tmp_path, QUICK + config + BEATER, beating=BEATING) as served:
        status = served.wait_for("broken", "given up")
        assert status.restarts == 3
        assert status.last_lines == ("first", "no such table: seeds")
        assert status.reason == "ended with exit code 3; restarted 3 times in a row"
        told = [n for n in served.notices if n.get("state") == "given up"]
        assert told[0]["lines"] == ["first", "no such table: seeds"]
        assert served.run(STATUS).returncode == 1


def test_one_that_is_well_in_between_is_never_given_up(tmp_path: Path) -> None:
    config = QUICK.replace("max_restarts = 3", "max_restarts = 1\nhealthy_seconds = 0.05")
    with Served(tmp_path, config + BEATER, beating=BEATING) as served:
        for restarts in range(4):
            status = wait_for(
                lambda restarts=restarts: (
                    (s := served.service("beater"))
                    and s.restarts == restarts
                    and s.beat is not None
                    and (s.beat.step or 0) > 3
                    and s
                )
            )
            assert status.pid is not None
            os.kill(status.pid, signal.SIGKILL)


def test_one_that_hangs_is_killed_after_its_silence_and_its_log_says_where(tmp_path: Path) -> None:
    with Served(tmp_path, QUICK + BEATER, beating=BEATING) as served:
        pid = served.wait_for("beater", "ready").pid
        (tmp_path / "hang").touch()
        back = ready_again(served, "beater")
        assert back.pid != pid
        reasons = [told["text"] for told in served.notices if told.get("state") == "stopping"]
        assert reasons == ["silent for 1 s"]
        assert 'File "' in (tmp_path / "serve/logs/beater.log").read_text()


def test_silence_counts_from_when_a_program_is_ready_however_long_that_took(
    tmp_path: Path,
) -> None:
    loading = """
import os, socket, sys, time
time.sleep(3.0)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(1.2)
while True:
    os.write(int(os.environ["ESPER_HEARTBEAT_FD"]), b'{"state": "running"}\\n')
    time.sleep(0.1)
"""
    port = free_port()
    config = f"""
[[service]]
name = "loading"
command = ["PYTHON", "-S", "loading.py", "{port}"]
ready = {{port = {port}}}
silent_seconds = 2
"""
    with Served(tmp_path, QUICK + config, loading=loading) as served:
        wait_for(lambda: (s := served.service("loading")) and (s.beat or s.restarts))
        assert served.states("loading") == ["starting", "ready"]


def test_one_that_does_not_become_ready_is_given_up_and_what_needs_it_never_starts(
    tmp_path: Path,
) -> None:
    config = f"""
[[service]]
name = "deaf"
command = ["sleep", "1000"]
ready = {{port = {free_port()}}}
ready_seconds = 0.2
"""
    with Served(tmp_path, QUICK + config + BEATER, beating=BEATING) as served:
        status = served.wait_for("deaf", "given up")
        assert status.reason == "not ready after 0.2 s; restarted 3 times in a row"
        assert served.states("beater") == ["waiting"]


def test_sigterm_kills_what_does_not_go_in_its_time_and_all_that_it_has_started(
    tmp_path: Path,
) -> None:
    with Served(tmp_path, QUICK + STUBBORN_SERVICE, stubborn=STUBBORN) as served:
        wait_until_stubborn_is_up(served)
        began = time.monotonic()
        served.signal(signal.SIGTERM)
        assert served.ended() == 0
        assert 1.0 <= time.monotonic() - began < 5.0
        wait_for(gone(served), seconds=5.0)
        status = served.service("stubborn")
        assert status is not None
        assert status.last_exit == "signal 9 (SIGKILL)"


def test_a_second_sigterm_ends_everything_at_once(tmp_path: Path) -> None:
    slow = QUICK.replace("drain_seconds = 1", "drain_seconds = 1000")
    with Served(tmp_path, slow + STUBBORN_SERVICE, stubborn=STUBBORN) as served:
        wait_until_stubborn_is_up(served)
        served.signal(signal.SIGTERM)
        served.wait_for("stubborn", "stopping")
        served.signal(signal.SIGINT)
        assert served.ended() == 0
        wait_for(gone(served), seconds=5.0)


def test_nothing_is_left_of_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """Nor of a program that ignores SIGTERM, or has left its session; `esper status` says so."""
    config = QUICK + BEATER + STUBBORN_SERVICE
    with Served(tmp_path, config, beating=BEATING, stubborn=STUBBORN) as served:
        wait_until_stubborn_is_up(served)
        assert served.run(STATUS).returncode == 0
        assert len(processes_with(served.mark)) == 7  # itself, two wardens, four of theirs
        served.signal(signal.SIGKILL)
        served.ended()
        wait_for(gone(served), seconds=5.0)
        told = served.run(STATUS)
        assert told.returncode == 3
        assert f"nobody serves: process {served.process.pid} ended" in told.stdout


@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=NO_SERVER)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_has_made_itself_a_daemon_ends_with_its_supervisor(
    number: signal.Signals, tmp_path: Path
) -> None:
    """It has a session of its own, and its title lies where its environment was."""
    port = free_port()
    shell = f"exec 9>{HELD}; {PROGRAM} --port {port} --save '' --daemonize yes; exec sleep 1000"
    config = f"""
[[service]]
name = "redis"
command = ["sh", "-c", "{shell}"]
ready = {{port = {port}}}
"""
    holders = Holders(tmp_path)
    with Served(tmp_path, QUICK + config) as served:
        served.wait_for("redis", "ready")
        assert not holders.gone()
        served.signal(number)
        served.ended()
        wait_for(holders.gone, seconds=5.0)


def test_a_program_does_not_outlive_its_warden_and_its_supervisor(tmp_path: Path) -> None:
    config = '[[service]]\nname = "sleeper"\ncommand = ["sleep", "1000"]\n'
    with Served(tmp_path, QUICK + config) as served:
        sleeper = served.wait_for("sleeper", "ready").pid
        for pid in set(processes_with(served.mark)) - {sleeper}:
            os.kill(pid, signal.SIGKILL)
        served.ended()
        wait_for(gone(served), seconds=5.0)


def test_a_supervisor_that_follows_a_killed_one_lets_its_programs_end_first(
    tmp_path: Path,
) -> None:
    """They still have the port that it needs, and a checkpoint to write once it has come."""
    port = free_port()
    saving = f"""
import os, signal, socket, sys, time
server = socket.create_server(("127.0.0.1", {port}))
def end(*_):
    while not os.path.exists("followed"):
        time.sleep(0.02)
    time.sleep(1.0)
    open("saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(1000)
"""
    config = f"""
[stop]
drain_seconds = 60
[[service]]
name = "saving"
command = ["PYTHON", "-S", "saving.py"]
ready = {{port = {port}}}
"""
    with Served(tmp_path, config, saving=saving) as served:
        pid = served.wait_for("saving", "ready").pid
        served.signal(signal.SIGKILL)
        served.ended()
        served.start()
        wait_for(lambda: has_open(served.process.pid, tmp_path / "serve/.lock"))
        (tmp_path / "followed").touch()
        new = wait_for(lambda: (s := served.status) and s.pid == served.process.pid and s)
        assert new.services[0].pid != pid
        served.wait_for("saving", "ready")
        assert (tmp_path / "saved").exists()
        assert "ended 2 processes of an esper serve before" in served.output


def test_a_warden_that_is_killed_takes_its_program_with_it_which_comes_back(
    tmp_path: Path,
) -> None:
    with Served(tmp_path, QUICK + STUBBORN_SERVICE, stubborn=STUBBORN) as served:
        wait_until_stubborn_is_up(served)
        before = set(processes_with(served.mark)) - {served.process.pid}
        (warden,) = (pid for pid in before if "warden.py" in command_line(pid))
        os.kill(warden, signal.SIGKILL)
        back = ready_again(served, "stubborn")
        assert back.last_exit == "its warden was killed"
        assert not before & set(processes_with(served.mark))


def test_sighup_starts_what_is_new_ends_what_is_gone_and_leaves_the_rest_alone(
    tmp_path: Path,
) -> None:
    named = '[[service]]\nname = "{}"\ncommand = ["sleep", "{}"]\n'
    before = QUICK + BEATER + named.format("changed", 1000) + named.format("gone", 1000)
    after = QUICK + BEATER + named.format("changed", 2000) + named.format("new", 1000)
    with Served(tmp_path, before, beating=BEATING) as served:
        served.wait_for("gone", "ready")
        old = {name: served.service(name) for name in ("beater", "changed")}
        served.configure(after)
        served.signal(signal.SIGHUP)
        served.wait_for("new", "ready")
        changed, beater = served.wait_for("changed", "ready"), served.wait_for("beater", "ready")
        assert beater.pid == old["beater"].pid
        assert changed.pid != old["changed"].pid
        assert command_line(changed.pid) == "sleep 2000 "
        assert served.service("gone") is None
        assert served.status.reload.text == (
            "started: new; restarted: changed; ended: gone; as before: beater"
        )


def test_sighup_starts_what_waited_for_a_service_that_is_gone_from_the_file(
    tmp_path: Path,
) -> None:
    deaf = f"""
[[service]]
name = "deaf"
command = ["sleep", "1000"]
ready = {{port = {free_port()}}}
"""
    with Served(tmp_path, QUICK + deaf + BEATER, beating=BEATING) as served:
        served.wait_for("beater", "waiting")
        served.configure(QUICK + BEATER)
        served.signal(signal.SIGHUP)
        served.wait_for("beater", "ready")


def test_sighup_hands_new_waits_to_what_goes_on(tmp_path: Path) -> None:
    with Served(tmp_path, QUICK + BEATER, beating=BEATING) as served:
        pid = served.wait_for("beater", "ready").pid
        assert pid is not None
        served.configure(QUICK.replace("max_restarts = 3", "max_restarts = 0") + BEATER)
        served.signal(signal.SIGHUP)
        wait_for(lambda: (s := served.status) and s.reload)
        assert served.wait_for("beater", "ready").pid == pid
        os.kill(pid, signal.SIGKILL)
        assert served.wait_for("beater", "given up").restarts == 0


def with_bus(folder: Path, url: str) -> str:
    """Return what a config says of a bus, and keep a key for it."""
    (folder / "keys").write_text("k" * 40)
    (folder / "keys").chmod(0o600)
    return f'[bus]\ncommands = "{url}"\nkey_file = "keys"\n'


def test_sighup_may_take_the_bus_away_before_its_server_is_ready(tmp_path: Path) -> None:
    port = free_port()
    bus = with_bus(tmp_path, f"redis://127.0.0.1:{port}/0")
    late = f"""
[[service]]
name = "late"
command = ["sleep", "1000"]
ready = {{port = {port}}}
"""
    with Served(tmp_path, QUICK + bus + late) as served:
        served.wait_for("late", "starting")
        served.configure(QUICK + late)
        served.signal(signal.SIGHUP)
        wait_for(lambda: (s := served.status) and s.reload)
        with socket.create_server(("127.0.0.1", port)):
            served.wait_for("late", "ready")
            served.configure(QUICK + late + BEATER)
            (tmp_path / "beating.py").write_text(BEATING)
            served.signal(signal.SIGHUP)
            served.wait_for("beater", "ready")


def test_a_job_goes_on_with_the_settings_of_its_folder_and_that_is_what_sighup_tells(
    tmp_path: Path,
) -> None:
    job = """
[[job]]
name = "digits"
task = "digits"
folder = "runs/digits"
set = ["trainer.epochs=EPOCHS", "count_flops=false"]
"""
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "config.json").touch()  # of a process that was killed
    with Served(tmp_path, QUICK + job.replace("EPOCHS", "100000")) as served:
        pid = served.wait_for("digits", "ready").pid
        served.configure(QUICK + job.replace("EPOCHS", "5"))
        served.signal(signal.SIGHUP)
        reload = wait_for(lambda: (s := served.status) and s.reload)
        assert reload.text == (
            "as before: digits; "
            "with the settings of its folder, as only a new run takes others: digits"
        )
        assert served.wait_for("digits", "ready").pid == pid


@pytest.mark.redis
@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=NO_SERVER)
@pytest.mark.parametrize("commands", [True, False])
def test_the_page_commands_runs_only_where_the_file_says_so(tmp_path: Path, commands: bool) -> None:
    port = free_port()
    config = f"""
[dashboard]
folder = "runs"
port = {port}
commands = {str(commands).lower()}
"""
    (tmp_path / "runs").mkdir()
    with (
        RedisServer() as server,
        Served(tmp_path, QUICK + with_bus(tmp_path, server.url) + config) as served,
    ):
        served.wait_for("dashboard", "ready")
        session = httpx.get(f"http://127.0.0.1:{port}/api/session").json()
        assert (session["command_token"] is not None) == commands


def test_sighup_with_a_wrong_file_says_why_and_changes_nothing(tmp_path: Path) -> None:
    with Served(tmp_path, QUICK + BEATER, beating=BEATING) as served:
        pid = served.wait_for("beater", "ready").pid
        served.configure(QUICK + BEATER.replace("silent_seconds", "silent_second"))
        served.signal(signal.SIGHUP)
        reload = wait_for(lambda: (s := served.status) and s.reload)
        assert not reload.done
        assert "unknown key 'service[1].silent_second'; did you mean 'service.silent_seconds'?" in (
            reload.text
        )
        assert served.wait_for("beater", "ready").pid == pid
        assert "did you mean" in served.run(STATUS).stdout


def test_sighup_starts_what_was_given_up_again(tmp_path: Path) -> None:
    config = '[[service]]\nname = "needy"\ncommand = ["sh", "-c", "test -e needed && sleep 1000"]\n'
    with Served(tmp_path, QUICK + config) as served:
        served.wait_for("needy", "given up")
        (tmp_path / "needed").touch()
        served.signal(signal.SIGHUP)
        served.wait_for("needy", "ready")


def test_a_second_supervisor_of_a_folder_is_refused(tmp_path: Path) -> None:
    with Served(tmp_path, QUICK + BEATER, beating=BEATING) as served:
        pid = served.wait_for("beater", "ready").pid
        second = served.run(SERVE, "esper.toml")
        assert second.returncode == 2
        assert "another esper serve has" in second.stderr
        assert served.wait_for("beater", "ready").pid == pid


def test_a_log_that_takes_nothing_is_told_everywhere_and_its_program_goes_on(
    tmp_path: Path,
) -> None:
    logs = tmp_path / "serve/logs"
    logs.mkdir(parents=True)
    (logs / "beater.log").symlink_to("/dev/full")
    with Served(tmp_path, QUICK + BEATER, beating=BEATING) as served:
        status = served.wait_for("beater", "ready")
        problem = "what it prints is lost: [Errno 28] No space left on device"
        assert status.reason == problem
        told = served.run(STATUS)
        assert told.returncode == 0
        assert problem in told.stdout
        assert ("ready", problem) in [
            (notice.get("state"), notice.get("text")) for notice in served.notices
        ]


@pytest.mark.parametrize("is_open", [False, True], ids=["gone", "not read"])
def test_all_goes_on_where_nobody_reads_any_more_what_serve_prints(
    is_open: bool, tmp_path: Path
) -> None:
    served = Served(tmp_path, QUICK + BEATER, beating=BEATING)
    reading, writing = os.pipe()
    served.start(output=writing)
    try:
        pid = served.wait_for("beater", "ready").pid
        if is_open:
            fill(writing)
        else:
            os.close(reading)
        os.close(writing)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert ready_again(served, "beater").pid != pid
        served.signal(signal.SIGTERM)
        assert served.ended() == 0
        if is_open:
            os.close(reading)
    finally:
        served.__exit__()


def test_what_the_output_has_no_letters_for_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = '[[service]]\nname = "broken"\ncommand = ["sh", "-c", "echo \u2713 loaded; exit 3"]\n'
    served = Served(tmp_path, QUICK + BEATER + config, beating=BEATING)
    monkeypatch.setattr(
        Served, "environment", {**served.environment, "PYTHONIOENCODING": "latin-1"}
    )
    with served:
        assert served.wait_for("broken", "given up").last_lines == ("\u2713 loaded",)
        assert "\\u2713 loaded" in served.output
        assert "\\u2713 loaded" in served.run(STATUS).stdout
        served.signal(signal.SIGTERM)
        assert served.ended() == 0


def fill(pipe: int) -> None:
    """Write into a pipe as much as it holds; whoever else writes into it has to wait then."""
    again = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (1 << 16, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(again, bytes(size))
    os.close(again)


def has_open(pid: int, file: Path) -> bool:
    for opened in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if opened.resolve() == file:
                return True
    return False


def wait_until_stubborn_is_up(served: Served) -> None:
    log = served.folder / "serve/logs/stubborn.log"
    served.wait_for("stubborn", "ready")
    wait_for(lambda: "stubborn is up" in log.read_text())


def ready_again(served: Served, name: str) -> ServiceStatus:
    """Wait until a program has been started a second time and is ready."""

    def there() -> ServiceStatus | None:
        status = served.service(name)
        again = status is not None and status.restarts == 1 and status.state == "ready"
        return status if again else None

    found = wait_for(there)
    assert found is not None
    return found
