"""The training of a policy in the dashboard: no run with empty figures, but what it is."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from starlette.testclient import TestClient

from browser import complaints, launched
from commanded import KEYRING
from esper.bus import InProcessBus
from esper.dashboard.access import Access
from esper.dashboard.bus_channel import BusCommandChannel
from esper.dashboard.server import Dashboard
from esper.dashboard.watcher import Watcher
from esper.telemetry import RunStore
from served_runs import CONFIG, serving, write_run
from told_training import begin, report, tell, write_training

REASON = "worker 1 was ended by signal 9"


@pytest.fixture
def training(tmp_path: Path) -> Iterator[RunStore]:
    """A training that goes on: six rollouts of ten, and a restart."""
    store = begin(tmp_path / "policy")
    for number in range(1, 7):
        tell(store, report(number), *([REASON] if number == 4 else []))
    yield store
    store.close()


def get(root: Path, path: str) -> Any:
    client = TestClient(Dashboard(root, Access(None, port=8265)).app(), base_url="http://localhost")
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_list_names_a_training_and_how_far_it_is(training: RunStore, tmp_path: Path) -> None:
    write_run(tmp_path / "own")
    rows = {row["id"]: row for row in get(tmp_path, "/api/runs")["rows"]}
    row = rows["policy"]
    assert (row["kind"], row["task"], row["policy"]) == ("training", "digits", "learning a policy")
    assert (row["status"], row["unit"], row["epoch"], row["epochs"]) == (
        *("running", "decision"),
        *(480, 800),
    )
    assert row["mean_return"] == row["trend"][-1] == pytest.approx(1.35)
    assert len(row["trend"]) == 6
    assert row["loss"] is row["best_loss"] is None
    assert row["resume"] == f"esper policy train --out {tmp_path / 'policy'}"
    assert (rows["own"]["kind"], rows["own"]["mean_return"]) == ("run", None)


def test_list_follows_a_training_that_was_told_of_more(training: RunStore, tmp_path: Path) -> None:
    watching = Watcher(tmp_path)
    watching.look()
    tell(training, report(7, total_steps=4000))
    assert watching.look()
    (row,) = watching.changes().rows
    assert (row.epoch, row.epochs, row.mean_return) == (560, 4000, pytest.approx(1.45))


def test_a_training_is_told_to_make_whole_rollouts_whatever_was_asked(
    training: RunStore, tmp_path: Path
) -> None:
    tell(training, report(7, total_steps=601))
    (row,) = get(tmp_path, "/api/runs")["rows"]
    assert (row["epoch"], row["epochs"]) == (560, 640)


def test_story_of_a_training_goes_on_with_it(training: RunStore, tmp_path: Path) -> None:
    tail = Watcher(tmp_path).tail("policy")
    tail.advance()
    state = tail.state()
    figures = {name: (value, remark) for name, value, remark in state.training_figures}
    assert state.figures is None
    assert state.slots == []
    assert figures["return"] == ("+1.2500", "mean of 3 rollouts, first +0.9500")
    assert figures["decisions"] == ("480", "of 800, in 6 rollouts")
    assert figures["restarts"] == ("1", "of environments")
    (line,) = state.lines
    assert (state.unit, line.epoch, REASON in line.words) == ("rollout", 4, True)
    version, charts = tail.charts()
    assert [chart.key for chart in charts][:3] == ["return", "return-parts", "final-loss"]
    tell(training, report(7), REASON)
    tail.advance()
    assert tail.charts()[0] != version
    assert tail.charts()[1][0].figure["data"][0]["y"][-1] == pytest.approx(1.45)
    assert ("restarts", "2", "of environments") in tail.state().training_figures


def test_training_made_anew_under_its_name_is_another(tmp_path: Path) -> None:
    write_training(tmp_path / "policy", 6)
    watching = Watcher(tmp_path)
    watching.look()
    tail = watching.tail("policy")
    tail.advance()
    before = tail.state()
    shutil.rmtree(tmp_path / "policy")
    write_training(tmp_path / "policy", [report(1)], task="other")
    watching.look()
    (row,) = watching.changes().rows
    assert (row.task, row.trend) == ("other", [pytest.approx(0.85)])
    tail.advance()
    after = tail.state()
    assert ("decisions", "80", "of 800, in 1 rollout") in after.training_figures
    assert before.telling != after.telling


def test_trainings_are_compared_by_their_return_and_runs_by_their_loss(tmp_path: Path) -> None:
    write_training(tmp_path / "one")
    write_training(tmp_path / "two", learning_rate=0.001)
    write_run(tmp_path / "run")
    both = get(tmp_path, "/api/compare?run=one&run=two")
    (chart,) = both["charts"]
    assert (chart["key"], [line["name"] for line in chart["figure"]["data"]]) == (
        "return",
        ["one", "two"],
    )
    assert [setting["name"] for setting in both["settings"]] == ["learning_rate"]
    mixed = get(tmp_path, "/api/compare?run=one&run=run")
    lines = {
        chart["key"]: [line["name"] for line in chart["figure"]["data"]]
        for chart in mixed["charts"]
    }
    assert lines == {
        "return": ["one"],
        "loss": ["run"],
        "flops": ["run"],
        "quality-accuracy": ["run"],
    }
    assert [run["metrics"].keys() for run in mixed["runs"]] == [
        *({}.keys(), {"loss": 0, "accuracy": 0}.keys()),
    ]


def test_nothing_is_asked_of_a_training_which_listens_to_no_bus(
    training: RunStore, tmp_path: Path
) -> None:
    config = {**CONFIG, "bus": {"commands": "redis://here"}}
    run = RunStore(tmp_path / "run", config=config, environment={})
    channel = BusCommandChannel(tmp_path, InProcessBus(), KEYRING, sender="ann")
    assert channel.offers("policy") == ()
    assert len(channel.offers("run")) > 0
    run.close()


@pytest.mark.browser
def test_page_shows_a_training_as_it_goes_on(training: RunStore, tmp_path: Path) -> None:
    with launched() as browser, serving(tmp_path) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        found = complaints(page)
        page.goto(server.address.url)
        row = page.locator(".row")
        expect(row).to_contain_text("learning a policy")
        expect(row).to_contain_text("return +1.3500")
        expect(row).to_contain_text("decision 480 / 800")
        expect(row).not_to_contain_text("no seeds")
        page.get_by_role("link", name="policy").first.click()
        expect(page.locator(".epochs")).to_have_text("decision 480 of 800")
        page.wait_for_selector(".charts[data-version] [data-key=return] .main-svg")
        shown = page.locator("#shown")
        expect(shown.locator(".figures")).to_contain_text("Return+1.2500")
        expect(shown.locator("ol.lines")).to_contain_text("rollout 4")
        expect(shown).not_to_contain_text("Parameters0")
        expect(shown).not_to_contain_text("Seeds committed0")
        version = str(page.locator(".charts").get_attribute("data-version"))
        tell(training, report(7))
        expect(page.locator(".epochs")).to_have_text("decision 560 of 800")
        expect(page.locator(".charts")).not_to_have_attribute("data-version", version)
        expect(shown.locator(".figures")).to_contain_text("of 800, in 7 rollouts")
        assert found == []
        page.close()
