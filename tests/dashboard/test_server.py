"""What the server tells of runs, and that it tells of nothing else."""

import asyncio
import json
import math
import os
import re
import shlex
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic_core import to_json
from starlette.testclient import TestClient

from esper.dashboard import DashboardServer
from esper.dashboard.access import Access
from esper.dashboard.assets import PLOTLY, assets
from esper.dashboard.commands import Command, CommandRefusedError, OfferedAction
from esper.dashboard.server import Dashboard
from esper.dashboard.watcher import Watcher
from esper.telemetry import RunStore
from served_runs import CONFIG, serving, skip, write_life, write_run

LOCAL = "http://localhost:8265"
SECRET = "outside the run folder"  # noqa: S105 – what must not be read


def client(root: Path, channel: "Channel | None" = None) -> TestClient:
    return TestClient(Dashboard(root, Access(None, port=8265), channel).app(), base_url=LOCAL)


def story(root: Path, run: str) -> dict[str, Any]:
    """Return what the page is told of a run that was read to its end."""
    tail = Watcher(root).tail(run)
    while tail.advance():
        pass
    state: dict[str, Any] = json.loads(to_json(tail.state(), inf_nan_mode="null"))
    return state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_in(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_in(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(served: Path) -> Iterator[DashboardServer]:
    with serving(served) as server:
        yield server


def folder_in(tmp_path: Path) -> Path:
    """Make a folder of runs beside what must not be read."""
    write_run(tmp_path / "outside" / "secret", task=SECRET)
    (tmp_path / "outside" / "run.txt").write_text(SECRET)
    root = tmp_path / "runs"
    write_run(root / "own")
    write_run(root / "search" / "other", learning_rate=0.02, trainer={"epochs": 20})
    (root / "link").symlink_to(tmp_path / "outside" / "secret")
    return root


def test_list_says_how_each_run_stands(root: Path) -> None:
    answer = client(root).get("/api/runs").json()
    assert answer["refused"] == [{"id": "link", "reason": "a link"}]
    rows = {row["id"]: row for row in answer["rows"]}
    assert sorted(rows) == ["own", "search/other"]
    own = rows["own"]
    assert (own["status"], own["task"], own["policy"]) == ("finished", "digits", "heuristic")
    assert (own["epoch"], own["epochs"], own["step"]) == (10, 10, 100)
    assert (own["committed"], own["pruned"], own["growing"]) == (1, 1, 0)
    assert own["loss"] == own["best_loss"] == 0.2
    assert own["trend"][0] == 2.0
    assert own["trend"][-1] == 0.2


def test_story_tells_figures_slots_and_events(root: Path) -> None:
    state = story(root, "search/other")
    figures = state["figures"]
    assert (figures["host_params"], figures["params"]) == (1000, 1300)
    assert (figures["committed"], figures["pruned"]) == (1, 1)
    assert figures["test_metrics"] == {"loss": 0.19}
    assert figures["metrics"] == {"loss": 0.2, "accuracy": 0.875, "flops": 1e7}
    first, second = state["slots"]
    assert (first["path"], first["stage"], first["committed"]) == (
        "stage1",
        "fossilized",
        ["conv_light"],
    )
    assert (second["stage"], second["blueprint"]) == ("pruned", None)
    words = [line["words"] for line in state["lines"]]
    assert words[0] == "run began: 1,000 parameters, 2 slots"
    assert "conv_light pruned from stage2: no use" in words


def test_living_seed_has_the_alpha_it_has_by_now(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config=CONFIG, environment={})
    write_life(store, slot="stage1", epoch=1)
    store.measure(3, 30, {"loss": 1.0})  # half of a ramp of 20 steps from step 20 on
    (slot,) = story(tmp_path, "run")["slots"]
    store.close()
    assert (slot["stage"], slot["blueprint"], slot["param_count"]) == (
        "blending",
        "conv_light",
        300,
    )
    assert slot["alpha"] == pytest.approx(0.5, abs=1 / 16)
    assert slot["contribution_fraction"] == 0.1


def test_charts_are_figures_that_plotly_takes(root: Path) -> None:
    answer = client(root).get("/api/runs/own/charts").json()
    assert answer["version"] == story(root, "own")["version"]
    keys = [chart["key"] for chart in answer["charts"]]
    assert "loss" in keys
    assert all({"data", "layout"} <= set(chart["figure"]) for chart in answer["charts"])


def test_comparison_overlays_curves_and_names_settings_that_differ(root: Path) -> None:
    answer = client(root).get("/api/compare?run=own&run=search/other").json()
    assert [run["row"]["id"] for run in answer["runs"]] == ["own", "search/other"]
    assert [run["params"] for run in answer["runs"]] == [1300, 1300]
    assert answer["settings"] == [
        {"name": "learning_rate", "values": [0.01, 0.02]},
        {"name": "trainer.epochs", "values": [10, 20]},
    ]
    loss = answer["charts"][0]
    assert [line["name"] for line in loss["figure"]["data"]] == ["own", "search/other"]
    assert len({line["line"]["color"] for line in loss["figure"]["data"]}) == 2


def test_comparison_of_nothing_is_refused(root: Path) -> None:
    assert client(root).get("/api/compare").status_code == 422


def test_comparison_with_a_run_that_is_not_there_is_unknown(root: Path) -> None:
    assert client(root).get("/api/compare?run=own&run=none").status_code == 404


def test_run_says_how_it_is_resumed_wherever_it_is(tmp_path: Path) -> None:
    root = tmp_path / "all runs"
    write_run(root / "it's one", finished=False)
    real = root.rename(tmp_path / "disk $1")
    root.symlink_to(real)
    for served in (root, root / "it's one"):
        (row,) = client(served).get("/api/runs").json()["rows"]
        assert shlex.split(row["resume"]) == ["esper", "resume", str(real / "it's one")]


def test_run_in_somebodys_own_loop_has_no_command_that_resumes_it_and_no_size(
    tmp_path: Path,
) -> None:
    store = RunStore(tmp_path / "run", config={"task": "my lm"}, environment={})
    write_life(store, slot="layers.0", epoch=1)
    store.close()
    (row,) = client(tmp_path).get("/api/runs").json()["rows"]
    assert (row["status"], row["resume"]) == ("killed", "")
    state = story(tmp_path, "run")
    assert (state["figures"]["host_params"], state["figures"]["params"]) == (None, None)
    assert [slot["path"] for slot in state["slots"]] == ["layers.0"]


def test_decisions_are_not_taken_for_epochs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", trainer={"epochs": 3, "decision_interval_steps": 10})
    (row,) = client(tmp_path).get("/api/runs").json()["rows"]
    assert (row["unit"], row["epoch"], row["epochs"]) == ("decision", 10, None)
    assert story(tmp_path, "run")["unit"] == "decision"


def test_folder_whose_name_is_no_text_is_served(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"runs-\xff")
    write_run(root / "run")
    (root / "run" / "config.json").unlink()  # which is said with its path
    (row,) = client(root).get("/api/runs").json()["rows"]
    assert row["status"] == "unreadable"
    assert "runs-?/run" in row["problem"]


def test_mistake_of_the_dashboards_own_is_no_damaged_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr("esper.dashboard.server.compare", mistaken)
    app = Dashboard(root, Access(None, port=8265)).app()
    api = TestClient(app, base_url=LOCAL, raise_server_exceptions=False)
    answer = api.get("/api/compare?run=own")
    assert answer.status_code == 500
    assert "its console says why" in answer.json()["problem"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_more_runs_than_can_be_told_apart_are_not_compared(root: Path) -> None:
    query = "&".join(f"run={index}" for index in range(9))
    answer = client(root).get(f"/api/compare?{query}")
    assert (answer.status_code, answer.json()["problem"]) == (
        422,
        "At most 8 runs can be compared.",
    )


@pytest.mark.parametrize(
    "run",
    [
        "..",
        "../outside/secret",
        "own/../../outside/secret",
        "..%2Foutside%2Fsecret",
        "%2e%2e/outside/secret",
        "%2e%2e%2foutside%2fsecret",
        "%252e%252e%252foutside%252fsecret",
        "..%5Coutside%5Csecret",
        "..%c0%afoutside%c0%afsecret",
        "%2Fetc%2Fpasswd",
        "/etc/passwd",
        "{outside}/secret",
        "own/..{outside}/secret",
        "own%00",
        "own/%00/../../outside/secret",
        "%00",
        "link",
        "search/../link",
        "./own",
        "own/",
        "",
        ".",
        "~",
        "file:///etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_run_folder(
    server: DashboardServer, served: Path, run: str
) -> None:
    run = run.format(outside=served.parent / "outside")
    paths = [f"/api/runs/{run}/charts", f"/static/{run}", f"/x{run}", f"/api/compare?run={run}"]
    for path in paths:
        status, text = raw_get(server, path)
        assert status == 404, path
        assert SECRET not in text


def test_name_with_a_nul_that_is_no_request_is_not_answered(server: DashboardServer) -> None:
    status, text = raw_get(server, "/api/runs/own\0/charts")
    assert (status, SECRET in text) == (400, False)


def raw_get(server: DashboardServer, path: str) -> tuple[int, str]:
    """Ask for a path just as it is; clients make it decent first, attackers do not."""
    place = urlsplit(server.address.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("linked", ["search", "search/other", "search/other/run.sqlite"])
def test_run_that_became_a_link_after_it_was_found_is_read_no_more(root: Path, linked: str) -> None:
    api = client(root)
    assert len(api.get("/api/runs").json()["rows"]) == 2
    assert api.get("/api/runs/search/other/charts").status_code == 200
    (root / linked).rename(root.parent / "moved")
    (root / linked).symlink_to(root.parent / "moved")
    assert api.get("/api/runs/search/other/charts").status_code == 404


def test_only_the_packages_own_files_are_static(root: Path) -> None:
    api = client(root)
    for name in ("dashboard.js", "dashboard.css", "esper.css", "charts.js", "plotly.js"):
        answer = api.get(f"/static/{name}")
        assert answer.status_code == 200
        again = api.get(f"/static/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for name in ("server.py", "__init__.py", "%2e%2e%2fserver.py", "index.html%00"):
        assert api.get(f"/static/{name}").status_code == 404


def test_page_asks_nothing_of_other_sites(root: Path) -> None:
    api = client(root)
    policy = api.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    for name, asset in assets().items():
        if name != PLOTLY:  # knows maps that may be loaded from elsewhere; the policy forbids it
            text = asset.content.decode().replace("http://www.w3.org/2000/svg", "")
            assert re.findall(r"""["'`(]\s*(?:https?:)?//[^\s"'`)]*""", text) == [], name


def test_damaged_run_is_named_and_others_stay_readable(root: Path) -> None:
    (root / "broken").mkdir()
    (root / "broken" / "run.sqlite").write_bytes(b"not a database" * 100)
    api = client(root)
    rows = {row["id"]: row for row in api.get("/api/runs").json()["rows"]}
    assert rows["broken"]["status"] == "unreadable"
    assert "is damaged" in rows["broken"]["problem"]
    assert rows["own"]["status"] == "finished"
    answer = api.get("/api/runs/broken/charts")
    assert answer.status_code == 422
    assert "is damaged" in answer.json()["problem"]


def test_losses_that_are_no_numbers_are_sent_as_null(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config=CONFIG, environment={})
    store.measure(1, 10, {"loss": 1.0})
    store.measure(2, 20, {"loss": math.nan})
    skip(store, 2, "loss is nan")
    store.close()
    api = client(tmp_path)
    (row,) = api.get("/api/runs").json()["rows"]
    assert (row["loss"], row["best_loss"], row["trend"]) == (None, 1.0, [1.0])
    assert story(tmp_path, "run")["figures"]["metrics"] == {"loss": None}
    assert api.get("/api/runs/run/charts").status_code == 200


def test_run_whose_folder_is_removed_is_gone(root: Path) -> None:
    api = client(root)
    assert api.get("/api/runs/own/charts").status_code == 200
    shutil.rmtree(root / "own")
    assert api.get("/api/runs/own/charts").status_code == 404


class Channel:
    """Offers two actions, and takes one of them."""

    def __init__(self) -> None:
        self.taken: list[Command] = []

    def offers(self, run: str) -> Sequence[OfferedAction]:
        return [
            OfferedAction(name="pause", label="Pause", target="run"),
            OfferedAction(name="prune", label="Prune", target="slot"),
        ]

    def send(self, command: Command) -> str:
        if command.slot == "stage2":
            raise CommandRefusedError("stage2 holds no seed")
        self.taken.append(command)
        return f"{command.action} sent"


def send(api: TestClient, body: dict[str, object], **headers: str) -> tuple[int, str]:
    secret = api.get("/api/session").json()["command_token"] or ""
    sent = {"origin": LOCAL, "x-esper-command": secret, **headers}
    answer = api.post("/api/runs/own/actions", json=body, headers=sent)
    return answer.status_code, answer.json().get("told") or answer.json()["problem"]


def test_without_a_channel_there_are_no_actions(root: Path) -> None:
    api = client(root)
    assert api.get("/api/session").json()["command_token"] is None
    assert send(api, {"action": "pause"})[0] == 404


def test_offered_action_is_passed_on_and_its_answer_told(root: Path) -> None:
    channel = Channel()
    api = client(root, channel)
    assert send(api, {"action": "pause"}) == (200, "pause sent")
    assert send(api, {"action": "prune", "slot": "stage1"}) == (200, "prune sent")
    assert channel.taken == [
        Command(run="own", action="pause", slot=None),
        Command(run="own", action="prune", slot="stage1"),
    ]


def test_refused_action_says_why(root: Path) -> None:
    channel = Channel()
    api = client(root, channel)
    assert send(api, {"action": "prune", "slot": "stage2"}) == (409, "stage2 holds no seed")
    assert send(api, {"action": "format"}) == (409, "format is not offered for own")
    assert send(api, {"action": "prune"}) == (409, "prune is not offered for own")
    assert channel.taken == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:9999"},
        {"origin": "null"},
        {"origin": "http://["},
        {"x-esper-command": ""},
        {"x-esper-command": "0" * 64},
    ],
)
def test_page_of_another_site_can_command_nothing(root: Path, headers: dict[str, str]) -> None:
    channel = Channel()
    assert send(client(root, channel), {"action": "pause"}, **headers)[0] == 403
    assert channel.taken == []


def test_command_is_taken_as_json_only_and_short(root: Path) -> None:
    api = client(root, Channel())
    secret = api.get("/api/session").json()["command_token"]
    headers = {"origin": LOCAL, "x-esper-command": secret}
    url = "/api/runs/own/actions"
    assert api.post(url, data={"action": "pause"}, headers=headers).status_code == 415
    assert send(api, {"action": "x" * 5000})[0] == 413
    nested = {**headers, "content-type": "application/json"}
    assert api.post(url, content="[" * 4000, headers=nested).status_code == 400


def test_run_that_does_not_answer_holds_up_nobody_who_only_looks(root: Path) -> None:
    asked, answered = threading.Event(), threading.Event()

    class Slow(Channel):
        def send(self, command: Command) -> str:
            asked.set()
            answered.wait(30.0)
            return super().send(command)

    async def look() -> int:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        access = Access(None, port=8265)
        app = Dashboard(root, access, Slow()).app()
        headers = {"x-esper-command": access.command_token}
        url = "/api/runs/own/actions"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as api:
            asking = asyncio.create_task(api.post(url, json={"action": "pause"}, headers=headers))
            try:
                while not asked.is_set():
                    await asyncio.sleep(0.001)
                async with asyncio.timeout(5.0):
                    return (await api.get("/api/runs")).status_code
            finally:
                answered.set()
                assert (await asking).json() == {"told": "pause sent"}

    assert asyncio.run(look()) == 200


@pytest.mark.parametrize("fails_in", ["offers", "send"])
def test_channel_that_fails_is_told_as_such(root: Path, fails_in: str) -> None:
    class Failing(Channel):
        def fail(self, *_: object) -> str:
            raise ConnectionError("nobody listens")

    channel = Failing()
    setattr(channel, fails_in, channel.fail)
    assert send(client(root, channel), {"action": "pause"}) == (
        502,
        "pause could not be passed on: nobody listens",
    )
