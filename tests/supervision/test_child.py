"""A program under its warden: how it ends is known, what it prints is kept, nothing is left."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from esper.supervision import child as child_module
from esper.supervision.child import Child, Ending
from esper.supervision.log_tail import last_lines
from esper.supervision.supervisor import end_left_behind
from esper.supervision.warden import HEAD, BoundedLog, marked_processes
from supervised import DAEMON, HELD, STUBBORN, Holders, wait_for

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found in /proc"
)


def new_child(
    folder: Path,
    *command: str,
    drain_seconds: float = 10.0,
    changed: Callable[[], None] = lambda: None,
) -> Child:
    return Child(
        "tried",
        command,
        working=folder,
        folder=folder,
        log=folder / "tried.log",
        drain_seconds=drain_seconds,
        changed=changed,
    )


def python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", script)


def ending_of(folder: Path, *command: str) -> Ending:
    async def run() -> Ending:
        child = new_child(folder, *command)
        ending = await child.ended()
        child.close()
        return ending

    return anyio.run(run)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (python(""), "exit code 0"),
        (python("raise SystemExit(7)"), "exit code 7"),
        (python("import os; os.kill(os.getpid(), 11)"), "signal 11 (SIGSEGV)"),
        (("no-such-program",), "no-such-program cannot be started: No such file or directory"),
    ],
)
def test_how_a_program_has_ended_is_known(
    tmp_path: Path, command: tuple[str, ...], told: str
) -> None:
    assert str(ending_of(tmp_path, *command)) == told


def test_what_it_prints_is_appended_to_its_log_which_others_cannot_read(tmp_path: Path) -> None:
    for word in ("first", "second"):
        script = f"import sys; print('{word}'); print('\\x1b[31mred', file=sys.stderr)"
        ending_of(tmp_path, *python(script))
    log = tmp_path / "tried.log"
    assert log.read_text().count(HEAD.decode()) == 2
    assert "first\n" in log.read_text()
    assert last_lines(log) == ("second", " [31mred")
    assert log.stat().st_mode & 0o777 == 0o600


def test_what_a_program_leaves_running_when_it_ends_is_killed(tmp_path: Path) -> None:
    ending_of(tmp_path, *python(STUBBORN.replace("time.sleep(1000)\n", "")))
    assert "stubborn is up" in (tmp_path / "tried.log").read_text()
    assert marked_processes([f"ESPER_SERVE_FOLDER={tmp_path}"]) == []


def ended_once_up(
    folder: Path,
    *command: str,
    drain_seconds: float = 10.0,
    before: Callable[[Child], None] = lambda _: None,
) -> Ending:
    """Order a program to end once it has printed that it is up.

    Args:
        folder: Of it.
        command: Of the program.
        drain_seconds: It may take to end.
        before: Is called before it is ordered.
    """
    log = folder / "tried.log"
    log.touch()

    async def run() -> Ending:
        child = new_child(folder, *command, drain_seconds=drain_seconds)
        await anyio.to_thread.run_sync(wait_for, lambda: last_lines(log)[-1:] == ("up",))
        await anyio.to_thread.run_sync(before, child)
        ending = await child.ended_by_order()
        child.close()
        return ending

    return anyio.run(run)


def test_a_program_has_time_to_end_and_what_it_has_started_too(tmp_path: Path) -> None:
    """Only the program itself is asked: it has use for its workers until then."""
    script = """
import signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
def end(*_):
    print("worker still there:", worker.poll() is None, flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(1000)
"""

    assert ended_once_up(tmp_path, *python(script)).code == 5
    assert last_lines(tmp_path / "tried.log") == ("up", "worker still there: True")
    assert marked_processes([f"ESPER_SERVE_FOLDER={tmp_path}"]) == []


def test_a_program_may_have_longer_to_end_than_any_selector_waits(tmp_path: Path) -> None:
    script = """
import signal, sys, time
def end(*_):
    time.sleep(0.2)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(1000)
"""
    assert ended_once_up(tmp_path, *python(script), drain_seconds=1e8).code == 5


def warden_of(folder: Path) -> int:
    (warden,) = (
        pid
        for pid in marked_processes([f"ESPER_SERVE_FOLDER={folder}"])
        if b"warden.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return warden


@pytest.mark.parametrize(
    "command",
    [python(STUBBORN.replace("stubborn is up", "up")), ("sh", "-c", DAEMON)],
    ids=range(2),
)
def test_a_warden_that_does_not_answer_is_killed_with_all_it_has(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_WARDEN_SECONDS", 0.2)
    holders = Holders(tmp_path)
    ending = ended_once_up(
        tmp_path,
        *command,
        drain_seconds=0.1,
        before=lambda _: os.kill(warden_of(tmp_path), signal.SIGSTOP),
    )
    assert ending.problem == "its warden was killed"
    assert marked_processes([f"ESPER_SERVE_FOLDER={tmp_path}"]) == []
    wait_for(holders.gone, seconds=5.0)


def test_what_hides_its_environment_and_starts_others_meanwhile_is_killed_too(
    tmp_path: Path,
) -> None:
    """A hundred processes, each of which starts the next one in a session of its own."""
    (tmp_path / "chain.py").write_text("""
import subprocess, sys, time
left = int(sys.argv[1])
if left:
    command = [sys.executable, "-S", __file__, str(left - 1)]
    subprocess.Popen(command, env={}, start_new_session=True, pass_fds=[9])
if left == 95:
    print("up", flush=True)
time.sleep(100)
""")
    holders = Holders(tmp_path)
    ended_once_up(
        tmp_path,
        *("sh", "-c", f"exec 9>{HELD}; exec {sys.executable} -S chain.py 100"),
        before=lambda _: stays(holders),
    )
    wait_for(holders.gone, seconds=5.0)


def stays(holders: Holders) -> None:
    assert not holders.gone()


def test_what_loses_its_parent_leaves_no_zombie_and_the_program_keeps_its_own_exit_code(
    tmp_path: Path,
) -> None:
    holders = Holders(tmp_path)
    orphans = f"for one in 1 2 3 4 5 6 7 8; do (exec 9>{HELD}; (sleep 0.2; exit 3) &); done"
    ending = f"{orphans}; trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done"

    def see_them_end(_: Child) -> None:
        wait_for(holders.gone)
        wait_for(lambda: num_children(warden_of(tmp_path)) == 1)

    assert ended_once_up(tmp_path, "sh", "-c", ending, before=see_them_end).code == 5


def num_children(parent: int) -> int:
    """Count the children of a process, dead ones that it has not waited for included."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found += int(stat.read_text().rpartition(")")[2].split()[1]) == parent
    return found


def test_a_supervisor_that_follows_a_killed_one_leaves_nothing_of_it_that_takes_too_long(
    tmp_path: Path,
) -> None:
    """Not even what only the warden knows of."""
    holders = Holders(tmp_path)

    def follow(child: Child) -> None:
        assert not holders.gone()
        child.end()
        assert end_left_behind(tmp_path, 0.1) > 0

    stubborn = f"trap '' TERM; {DAEMON}"
    ended_once_up(tmp_path, "sh", "-c", stubborn, drain_seconds=100.0, before=follow)
    wait_for(holders.gone, seconds=5.0)


def test_no_pipe_is_left_open(tmp_path: Path) -> None:
    ending_of(tmp_path, *python(""))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        ending_of(tmp_path, *python(""))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_log_is_bounded_and_one_old_one_is_kept(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 1000)
    for number in range(100):
        log.write(f"{number:049}\n".encode())
    log.close()
    old, new = (tmp_path / "log.1").read_text(), (tmp_path / "log").read_text()
    assert len(old) == 1000
    assert len(new) <= 1000
    assert (old + new).split() == [f"{number:049}" for number in range(60, 100)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_a_log_that_cannot_be_begun_anew_for_a_while_is_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = BoundedLog(tmp_path / "log", 10)
    log.write(b"the first")
    with monkeypatch.context() as failing:
        failing.setattr(log, "_opened", lambda: os.open(tmp_path / "no" / "log", os.O_RDONLY))
        for _ in range(2):
            with pytest.raises(OSError, match="No such file"):
                log.write(b"lost")
    log.write(b"the next")
    log.close()
    assert (tmp_path / "log.1").read_text() == "the first"
    assert (tmp_path / "log").read_text() == "the next"


def test_a_program_prints_far_more_than_its_log_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "LOG_BYTES", 100_000)
    script = "for number in range(100_000): print(f'{number:09}')"
    assert ending_of(tmp_path, *python(script)).code == 0
    sizes = [(tmp_path / name).stat().st_size for name in ("tried.log", "tried.log.1")]
    assert all(size <= 100_000 for size in sizes)
    assert last_lines(tmp_path / "tried.log")[-1] == "000099999"


def test_that_what_it_prints_is_lost_is_told_as_long_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "LOG_BYTES", 1000)
    in_the_way = tmp_path / "tried.log.1"
    in_the_way.mkdir()
    told: list[str | None] = []

    async def run() -> None:
        script = "import time\nwhile True:\n print('a line'); time.sleep(0.001)"
        child = new_child(tmp_path, *python(script), changed=lambda: told.append(child.log_problem))
        async with anyio.create_task_group() as running:
            running.start_soon(child.ended)
            await anyio.to_thread.run_sync(wait_for, lambda: told)
            in_the_way.rmdir()
            await anyio.to_thread.run_sync(wait_for, lambda: len(told) == 2)
            child.kill()
        child.close()

    anyio.run(run)
    problem, after = told
    assert (problem or "").startswith("what it prints is lost: [Errno 21] Is a directory")
    assert after is None
