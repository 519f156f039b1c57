"""News of runs: within a second, without gaps, through restarts of server and run."""

import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from esper.dashboard import AddressError, Command, DashboardServer, OfferedAction
from esper.dashboard.run_tail import RunTail
from esper.telemetry import RunFolderError, RunReader, RunStore
from served_runs import CONFIG, answers, eventually, serving, streaming, write_run, writing

ONE_SECOND = 1.0


def test_event_of_another_process_arrives_within_a_second(tmp_path: Path) -> None:
    with (
        writing(tmp_path / "run") as run,
        serving(tmp_path) as server,
        streaming(server.address.url, run="run") as stream,
    ):
        (row,) = stream.next("runs")["rows"]
        assert row["status"] == "running"
        assert stream.next("story")["whole"]
        for epoch in range(1, 6):
            began = time.monotonic()
            run.tell("skip", epoch, f"reason {epoch}")
            (line,) = stream.next("story")["state"]["lines"]
            assert time.monotonic() - began < ONE_SECOND
            assert line["words"] == f"step {10 * epoch} skipped: reason {epoch}"
            assert line["priority"] == "critical"
        run.tell("measure", 7, 0.25)
        (row,) = stream.next("runs", lambda news: news["rows"][0]["loss"] == 0.25)["rows"]
        assert (row["events"], row["epoch"]) == (5, 7)
        run.tell("finish")
        stream.next("runs", lambda news: news["rows"][0]["status"] == "finished")


def test_new_run_and_removed_run_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    with serving(tmp_path) as server, streaming(server.address.url) as stream:
        news = stream.next("runs")
        assert (news["whole"], [row["id"] for row in news["rows"]]) == (True, ["first"])
        write_run(tmp_path / "second")
        news = stream.next("runs", lambda news: news["rows"][0]["status"] == "finished")
        assert (news["whole"], [row["id"] for row in news["rows"]]) == (False, ["second"])
        (tmp_path / "first").rename(tmp_path / ".away")
        assert stream.next("runs")["gone"] == ["first"]


def test_killed_run_is_shown_as_killed_and_resumed_as_running(tmp_path: Path) -> None:
    with serving(tmp_path) as server, streaming(server.address.url) as stream:
        with writing(tmp_path / "run") as run:
            run.tell("skip", 1, "bad")
            stream.next("runs", lambda news: news["rows"] and news["rows"][0]["events"] == 1)
            run.kill()
            (row,) = stream.next("runs")["rows"]
            assert row["status"] == "killed"
        with writing(tmp_path / "run", "0"):
            (row,) = stream.next("runs", lambda news: news["rows"][0]["status"] == "running")[
                "rows"
            ]
            assert row["attempt"] == 2


def test_value_measured_later_in_the_same_epoch_is_told(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config=CONFIG, environment={})
    store.measure(1, 10, {"loss": 1.0})
    with serving(tmp_path) as server, streaming(server.address.url, run="run") as stream:
        stream.next("story")
        for name in ("train_loss", "flops"):
            store.measure(1, 10, {name: 2.0})
            state = stream.next("story")["state"]
            assert state["figures"]["metrics"][name] == 2.0
    store.close()


def test_channel_that_fails_breaks_no_page(tmp_path: Path) -> None:
    class Failing:
        def offers(self, run: str) -> Sequence[OfferedAction]:
            raise ConnectionError("nobody listens")

        def send(self, command: Command) -> str:
            return ""

    write_run(tmp_path / "run")
    with (
        serving(tmp_path, channel=Failing()) as server,
        streaming(server.address.url, run="run") as stream,
    ):
        message = stream.next("story")
        assert message["problem"] == "What can be asked of the run is not known: nobody listens"
        assert message["state"]["figures"]["committed"] == 1


def test_folder_that_is_asked_for_and_not_shown_says_why(tmp_path: Path) -> None:
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "compare.json").write_text("{}")
    with serving(tmp_path) as server:
        for run, problem in (
            (
                "compared",
                "This is not shown here: a comparison; see esper inspect, or its report.html.",
            ),
            ("nothing", "There is no such run, or no longer."),
        ):
            with streaming(server.address.url, run=run) as stream:
                assert stream.next("story")["problem"] == problem


def test_story_that_could_not_be_read_once_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: RunTail) -> bool:
        raise RunFolderError("not now")

    write_run(tmp_path / "run")
    with serving(tmp_path) as server, monkeypatch.context() as patched:
        patched.setattr(RunTail, "advance", fail)
        with streaming(server.address.url, run="run") as stream:
            assert stream.next("story")["problem"] == "The run cannot be read: not now"
            patched.undo()
            write_run(tmp_path / "other")
            message = stream.next("story")
            assert (message["problem"], message["whole"]) == (None, True)


def test_story_that_cannot_be_sent_or_told_stops_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    config: list[object] = []
    for _ in range(400):
        config = [config]
    for broken in (lambda _: {"deep": config}, lambda _: {}["no such key"]):
        monkeypatch.setattr(RunReader, "config", broken)
        with serving(tmp_path) as server, streaming(server.address.url, run="run") as stream:
            assert stream.next("runs")["rows"]
            assert re.match("The run cannot be (sent|told)", stream.next("story")["problem"])
            write_run(tmp_path / f"next-{len(list(tmp_path.iterdir()))}")
            assert stream.next("runs")["rows"]


def test_story_of_a_resumed_run_is_told_anew(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        with writing(tmp_path / "run") as run:
            for epoch in (1, 2, 3):
                run.tell("skip", epoch, f"first {epoch}")
            run.kill()
        with streaming(server.address.url, run="run") as stream:
            lines = stream.next("story")["state"]["lines"]
            assert [line["epoch"] for line in lines] == [1, 2, 3]
            with writing(tmp_path / "run", "15") as resumed:
                message = stream.next("story")
                assert message["whole"]
                lines = message["state"]["lines"]
                assert [line["words"] for line in lines] == ["step 10 skipped: first 1"]
                resumed.tell("skip", 2, "second time")
                message = stream.next("story", lambda news: news["state"]["lines"])
                assert not message["whole"]
                assert message["state"]["figures"]["interventions"] == 2


def test_only_what_is_news_is_sent_after_a_connection_broke(tmp_path: Path) -> None:
    write_run(tmp_path / "old")
    with serving(tmp_path) as server:
        with streaming(server.address.url) as stream:
            stream.next("runs")
            last_id = stream.last_id
        write_run(tmp_path / "new")
        with streaming(server.address.url, last_id=last_id) as stream:
            news = stream.next("runs")
            assert not news["whole"]
            assert [row["id"] for row in news["rows"]] == ["new"]


def test_restarted_server_sends_everything_anew_also_for_an_id_that_none_gives(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "run")
    with serving(tmp_path) as server, streaming(server.address.url) as stream:
        stream.next("runs")
        last_id = stream.last_id
    with serving(tmp_path) as server, streaming(server.address.url, last_id=last_id) as stream:
        assert stream.next("runs")["whole"]
        name, _, _ = stream.last_id.partition("-")
        with streaming(server.address.url, last_id=f"{name}-{5000 * '9'}") as other:
            assert other.next("runs")["whole"]


def test_server_ends_at_once_with_streams_open(tmp_path: Path) -> None:
    with serving(tmp_path) as server, streaming(server.address.url) as stream:
        stream.next("runs")
        server.stop()
        assert stream.is_over()
        eventually(lambda: not answers(server.address.url))


def test_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        port = int(server.address.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(AddressError, match=f"port {port} of 127.0.0.1 is taken"):
            DashboardServer(tmp_path, port=port)


def test_port_is_taken_before_it_is_served(tmp_path: Path) -> None:
    first = DashboardServer(str(tmp_path))
    port = int(first.address.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(AddressError, match=f"port {port} of 127.0.0.1 is taken"):
        DashboardServer(tmp_path, port=port)
    first.close()


@pytest.mark.parametrize(
    ("host", "given", "generated"),
    [
        ("0.0.0.0", None, True),  # noqa: S104
        ("0.0.0.0", "x" * 20, False),  # noqa: S104
        ("localhost", None, False),
        ("127.0.0.1", "x" * 20, False),
    ],
)
def test_beyond_loopback_a_token_is_needed_and_made_if_none_is_given(
    tmp_path: Path, host: str, given: str | None, generated: bool
) -> None:
    server = DashboardServer(tmp_path, host=host, token=given)
    server.close()
    address = server.address
    assert address.generated is generated
    if generated:
        assert address.token is not None
        assert len(address.token) >= 43
        assert address.url_with_token == f"{address.url}#token={address.token}"
    else:
        assert address.token == given


def test_command_takes_all_files_it_may_and_ends_at_once_on_ctrl_c_with_streams_open(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "all [lr]:smile:"
    folder.mkdir()
    write_run(folder / "run")
    command = [sys.executable, "-m", "esper", "dashboard", str(folder), "--port", "0"]
    few_files = ["sh", "-c", 'ulimit -Sn 100; exec "$@"', "sh", *command]
    with (
        subprocess.Popen(few_files, stdout=subprocess.PIPE, text=True) as process,
        ExitStack() as whatever_comes,
    ):
        whatever_comes.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == f"runs in {folder}\n"
        url = process.stdout.readline().strip()
        eventually(lambda: answers(url))
        may_open, most = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        with streaming(url) as stream:
            stream.next("runs")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0  # while the stream is open, which never ends
        assert process.stdout.read() == "ended\n"
    assert may_open == most
