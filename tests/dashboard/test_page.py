"""The page in a real browser: what it shows, how soon, and through which mishaps."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect

from browser import complaints, keep_screenshot, launched
from esper.bus.messages import RunMessage
from esper.bus.mirror import Mirror
from esper.dashboard import Command, OfferedAction
from esper.lifecycle.events import CheckpointDamaged, EventRecord, RunStarted, StepSkipped
from esper.telemetry import RunStore
from served_runs import CONFIG, publish, serving, skip, write_life, write_run, writing

pytestmark = pytest.mark.browser

ONE_SECOND = 1.0
SERVER_AWAY = "net::ERR_"  # a test's server may end before its page does
TOKEN = "a token that is long enough"  # noqa: S105 – only this test's


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must not complain of anything."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    found = complaints(page)
    yield page
    page.close()
    assert [words for words in found if SERVER_AWAY not in words] == []


@pytest.fixture
def lenient_page(browser: Browser) -> Iterator[Page]:
    """A page that may complain: of a server that is away, or of a token that is wrong."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    yield page
    page.close()


def status(page: Page, run: str = "run") -> str:
    return page.locator(f".row:has(.name:text-is('{run}')) .status").inner_text()


def charts_drawn(page: Page) -> None:
    page.wait_for_selector(".charts[data-version] .main-svg")


def test_run_is_opened_from_the_list_and_left_by_the_back_button(
    page: Page, tmp_path: Path
) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "search" / "two")
    with serving(tmp_path) as server:
        page.goto(server.address.url)
        expect(page.get_by_role("heading", name="2 runs")).to_be_visible()
        page.get_by_role("link", name="search/two").first.click()
        expect(page).to_have_url(f"{server.address.url}?run=search%2Ftwo")
        expect(page.get_by_role("heading", level=1)).to_have_text("search/two")
        expect(page.locator(".slot")).to_have_count(2)
        expect(page.locator(".slot").first).to_contain_text("fossilized")
        expect(page.locator(".figures")).to_contain_text("1,300")
        expect(page.locator(".lines li").first).to_contain_text("run finished")
        charts_drawn(page)
        expect(page.get_by_role("heading", name="Loss", exact=True)).to_be_visible()
        page.go_back()
        expect(page.get_by_role("heading", name="2 runs")).to_be_visible()
        page.go_forward()
        expect(page.get_by_role("heading", level=1)).to_have_text("search/two")


def test_event_is_in_the_page_within_a_second(page: Page, tmp_path: Path) -> None:
    with writing(tmp_path / "run") as run, serving(tmp_path) as server:
        run.tell("measure", 1, 2.0)
        page.goto(f"{server.address.url}?run=run")
        charts_drawn(page)
        for epoch in (2, 3, 4):
            began = time.monotonic()
            run.tell("skip", epoch, f"reason {epoch}")
            page.wait_for_selector(f".lines li:has-text('reason {epoch}')")
            assert time.monotonic() - began < ONE_SECOND
        assert page.locator(".lines li").first.get_attribute("data-priority") == "critical"
        began = time.monotonic()
        run.tell("grow", 5)
        page.wait_for_selector(".slot:has-text('blending')")
        assert time.monotonic() - began < ONE_SECOND
        run.tell("measure", 7, 0.125)
        expect(page.locator(".figures")).to_contain_text("0.1250")
        expect(page.locator(".row .loss")).to_contain_text("0.1250")
        version = page.locator(".charts").get_attribute("data-version")
        run.tell("measure", 8, 0.1)
        expect(page.locator(".charts")).not_to_have_attribute("data-version", str(version))


def test_killed_run_says_so_and_the_resumed_one_tells_its_own_story(
    page: Page, tmp_path: Path
) -> None:
    with serving(tmp_path) as server:
        with writing(tmp_path / "run") as run:
            for epoch in (1, 2, 3):
                run.tell("skip", epoch, f"first-{epoch}")
            page.goto(f"{server.address.url}?run=run")
            expect(page.locator(".lines li")).to_have_count(3)
            assert status(page) == "running"
            run.kill()
            expect(page.locator(".story-head .status")).to_have_text("killed")
            assert status(page) == "killed"
            expect(page.locator("#said")).to_have_text("run: killed")
        with writing(tmp_path / "run", "15") as resumed:
            expect(page.locator(".story-head .status")).to_have_text("running")
            expect(page.locator(".lines li")).to_have_count(1)
            expect(page.locator(".lines li")).to_contain_text("first-1")
            resumed.tell("skip", 2, "second")
            expect(page.locator(".lines li").first).to_contain_text("second")


def test_page_goes_on_when_the_server_was_restarted(lenient_page: Page, tmp_path: Path) -> None:
    page = lenient_page
    with writing(tmp_path / "run") as run:
        run.tell("skip", 1, "before")
        with serving(tmp_path) as server:
            port = int(server.address.url.rstrip("/").rpartition(":")[2])
            page.goto(f"{server.address.url}?run=run")
            expect(page.locator(".lines li")).to_have_count(1)
            expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#connection")).to_contain_text("disconnected")
        expect(page.locator(".lines li")).to_have_count(1)
        run.tell("skip", 2, "meanwhile")
        with serving(tmp_path, port=port):
            expect(page.locator("#connection")).to_have_text("live")
            expect(page.locator(".lines li").first).to_contain_text("meanwhile")
            run.tell("skip", 3, "after")
            expect(page.locator(".lines li").first).to_contain_text("after")
            expect(page.locator(".lines li")).to_have_count(3)


def test_several_runs_are_compared_at_an_address_that_can_be_sent(
    page: Page, tmp_path: Path
) -> None:
    for name, rate in (("slow", 0.01), ("fast", 0.02), ("other", 0.01)):
        write_run(tmp_path / name, learning_rate=rate)
    with serving(tmp_path) as server:
        page.goto(server.address.url)
        page.get_by_label("Compare slow").check()
        page.get_by_label("Compare fast").check()
        expect(page.get_by_role("heading", name="2 runs compared")).to_be_visible()
        charts_drawn(page)
        legend = page.locator("[data-key=loss] .legendtext")
        expect(legend).to_have_text(["slow", "fast"])
        table = page.get_by_role("table", name="Figures of the runs")
        expect(table.get_by_role("row", name=re.compile("Parameters"))).to_contain_text("1,300")
        settings = page.get_by_role("table", name="Settings that differ")
        expect(settings.locator("tbody tr")).to_have_count(1)
        expect(settings).to_contain_text("learning_rate")
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        expect(page.get_by_role("heading", name="2 runs compared")).to_be_visible()
        expect(page.get_by_label("Compare slow")).to_be_checked()
        page.get_by_role("link", name="Leave out slow").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("fast")


def test_list_is_filtered_and_used_by_keyboard_alone(page: Page, tmp_path: Path) -> None:
    write_run(tmp_path / "one", policy="schedule")
    write_run(tmp_path / "two")
    with serving(tmp_path) as server:
        page.goto(server.address.url)
        expect(page.locator(".row:visible")).to_have_count(2)
        page.keyboard.press("/")
        page.keyboard.type("sched fin")
        expect(page.locator(".row:visible")).to_have_count(1)
        expect(page.locator("#count")).to_have_text("1 of 2")
        page.keyboard.press("Tab")
        expect(page.get_by_label("Compare one")).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("one")
        page.locator("#filter").fill("nothing like it")
        expect(page.locator("#runs")).to_contain_text("No run matches the filter.")


def test_token_in_the_address_lets_in_and_is_removed_from_it(
    page: Page, browser: Browser, tmp_path: Path
) -> None:
    write_run(tmp_path / "run")
    with serving(tmp_path, token=TOKEN) as server:
        page.goto(server.address.url_with_token.replace(" ", "%20"))
        expect(page.locator(".row")).to_have_count(1)
        assert page.url == server.address.url
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert page.evaluate("document.cookie") == ""
        page.reload()
        expect(page.locator(".row")).to_have_count(1)


def test_page_asks_for_the_token(lenient_page: Page, tmp_path: Path) -> None:
    page = lenient_page
    write_run(tmp_path / "run")
    with serving(tmp_path, token=TOKEN) as server:
        page.goto(f"{server.address.url}?run=run")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_have_text("This is not the token.")
        assert page.locator(".row").count() == 0
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("run")


def test_token_pasted_into_an_open_page_lets_in_and_a_wrong_one_says_so(
    lenient_page: Page, tmp_path: Path
) -> None:
    page = lenient_page
    write_run(tmp_path / "run")
    with serving(tmp_path, token=TOKEN) as server:
        for wrong in ("wrong", "%zz"):
            page.goto(f"{server.address.url}#token={wrong}")
            expect(page.get_by_role("alert")).to_have_text("This is not the token.")
            expect(page).to_have_url(server.address.url)
        page.evaluate("token => { location.hash = `token=${token}`; }", TOKEN.replace(" ", "%20"))
        expect(page.locator(".row")).to_have_count(1)
        expect(page).to_have_url(server.address.url)
        page.evaluate("location.hash = 'token=wrong'")
        expect(page.locator(".toast")).to_have_text("This is not the token.")
        expect(page).to_have_url(server.address.url)
        expect(page.locator(".row")).to_have_count(1)


def test_charts_that_cannot_be_drawn_say_why(lenient_page: Page, tmp_path: Path) -> None:
    page = lenient_page
    for name in ("one", "two"):
        write_run(tmp_path / name)
    with serving(tmp_path) as server:
        for query, asked in (("?run=one", "**/charts"), ("?run=one&run=two", "**/api/compare*")):
            problem = {"status": 500, "json": {"problem": "out of paint"}}
            page.route(asked, lambda route, _, answer=problem: route.fulfill(**answer))
            page.goto(server.address.url + query)
            expect(page.get_by_role("alert")).to_have_text(
                "The charts cannot be drawn: out of paint"
            )
            page.unroute(asked)
            charts_drawn(page)
            expect(page.get_by_role("alert")).to_have_count(0)


class Channel:
    """Offers to pause a run and to prune a seed."""

    def __init__(self) -> None:
        self.taken: list[Command] = []

    def offers(self, run: str) -> Sequence[OfferedAction]:
        question = "Prune this seed?"
        return [
            OfferedAction(name="pause", label="Pause", target="run"),
            OfferedAction(name="prune", label="Prune", target="slot", question=question),
        ]

    def send(self, command: Command) -> str:
        self.taken.append(command)
        return f"{command.action} is on its way"


def test_actions_are_shown_only_with_a_channel_and_reach_it(page: Page, tmp_path: Path) -> None:
    channel = Channel()
    with writing(tmp_path / "run") as run:
        run.tell("grow", 1)
        with serving(tmp_path) as server:
            page.goto(f"{server.address.url}?run=run")
            expect(page.locator(".slot")).to_contain_text("blending")
            expect(page.locator("main button")).to_have_count(0)
        page.goto("about:blank")
        with serving(tmp_path, channel=channel) as server:
            page.goto(f"{server.address.url}?run=run")
            page.get_by_role("button", name="Pause").click()
            expect(page.locator(".toast")).to_have_text("pause is on its way")
            page.on("dialog", lambda dialog: dialog.accept())
            page.get_by_role("button", name="Prune stage1").click()
            expect(page.locator(".toast").last).to_have_text("prune is on its way")
            run.kill()
            expect(page.locator(".story-head .status")).to_have_text("killed")
            expect(page.locator("main button")).to_have_count(0)
    assert channel.taken == [
        Command(run="run", action="pause", slot=None),
        Command(run="run", action="prune", slot="stage1"),
    ]


def test_action_that_fails_is_told_and_can_be_tried_again(
    lenient_page: Page, tmp_path: Path
) -> None:
    class Failing(Channel):
        def send(self, command: Command) -> str:
            raise ConnectionError("nobody listens")

    page = lenient_page
    with writing(tmp_path / "run"), serving(tmp_path, channel=Failing()) as server:
        page.goto(f"{server.address.url}?run=run")
        button = page.get_by_role("button", name="Pause")
        button.click()
        told = "pause could not be passed on: nobody listens"
        expect(page.locator(".toast")).to_have_text(told)
        expect(button).to_be_enabled()
        page.route("**/actions", lambda route: route.fulfill(status=502, body="<html>"))
        button.click()
        expect(page.locator(".toast").last).to_have_text("The server answered 502.")
        expect(button).to_be_enabled()


def test_decisions_odd_times_and_what_is_not_shown_are_told_as_they_are(
    page: Page, tmp_path: Path
) -> None:
    trainer = {"epochs": 3, "decision_interval_steps": 10}
    config = {**CONFIG, "trainer": trainer, "random_seed": 1234}
    store = RunStore(tmp_path / "the run", config=config, environment={})
    store.publish(
        EventRecord(time_seconds=1e18, epoch=20, step=200, event=StepSkipped(reason="x", value=1.0))
    )
    write_life(store, slot="stage1", epoch=21)
    store.close()
    write_run(tmp_path / "other", random_seed=1234)
    (tmp_path / "link").symlink_to("the run")
    write_run(tmp_path / "two\nlines")
    with serving(tmp_path) as server:
        page.goto(server.address.url)
        expect(page.locator("#refused")).to_have_text(
            "Not shown: link (a link); two lines (its name has characters that cannot be shown)"
        )
        expect(page.locator("main code")).to_have_text(f"esper resume '{tmp_path}/the run'")
        expect(page.locator(".row:has-text('the run')")).to_contain_text("decision 22")
        page.get_by_role("link", name="the run").first.click()
        expect(page.locator(".lines li")).to_contain_text(["· decision 20"])
        expect(page.locator(".slot")).to_contain_text("blending since decision 22")
        expect(page.locator(".story-head")).to_contain_text("random seed 1234")
        assert "epoch" not in page.locator("main").inner_text().replace("per epoch", "")
        page.get_by_label("Compare other").check()
        row = page.get_by_role("row", name=re.compile("Random seed"))
        expect(row).to_contain_text("1234")


def test_a_command_that_resumes_is_named_only_for_runs_of_this_machine(
    page: Page, tmp_path: Path
) -> None:
    mirror = Mirror(tmp_path / "far", RunMessage(config=CONFIG, environment={}, after_step=-1))
    mirror.set_status("interrupted")
    mirror.close()
    write_run(tmp_path / "near", finished=False)
    with serving(tmp_path) as server:
        page.goto(server.address.url)
        expect(page.locator("main .runs-now li")).to_have_count(2)
        expect(page.locator("main code")).to_have_text(f"esper resume {tmp_path}/near")


def test_run_that_stopped_with_a_living_seed_has_it_and_no_size_that_nobody_told(
    page: Page, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run", config={"task": "my lm"}, environment={})
    write_life(store, slot="layers.0", epoch=1)
    store.close()
    with serving(tmp_path) as server:
        page.goto(f"{server.address.url}?run=run")
        expect(page.locator(".row .growing")).to_have_attribute("title", "1 seed still growing")
        expect(page.locator(".figures")).to_contain_text("the host's are not known")
        expect(page.locator(".figures")).to_contain_text("0 pruned, 1 growing")


def test_names_are_shown_as_text_and_never_run(page: Page, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    store = RunStore(tmp_path / evil, config={**CONFIG, "task": evil}, environment={})
    publish(store, 0, RunStarted(slots=(evil,), host_param_count=1))
    skip(store, 1, evil)
    write_life(store, slot=evil, epoch=1)
    store.close()
    with serving(tmp_path) as server:
        page.goto(server.address.url)
        page.get_by_role("link", name=evil).first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(evil)
        charts_drawn(page)
        page.get_by_label(f"Compare {evil}").uncheck()
        assert page.locator("img[src=x]").count() == 0


def test_names_are_shown_in_charts_as_they_are(page: Page, tmp_path: Path) -> None:
    names = ["<b>x<", "<a href='x:y'>z<", "a &amp; b"]
    for name in names:
        store = RunStore(tmp_path / name, config=CONFIG, environment={})
        publish(store, 0, RunStarted(slots=(name,), host_param_count=1))
        for epoch in (1, 2, 3):
            store.measure(epoch, 10 * epoch, {"loss": 1.0})
        write_life(store, slot=name, epoch=1)
        store.close()
    pointed_at = """(key) => {
      const plot = document.querySelector(`[data-key=${key}] .plot`);
      Plotly.Fx.hover(plot, [{ curveNumber: 0, pointNumber: 0 }]);
      return plot.querySelector(".hoverlayer").textContent;
    }"""
    with serving(tmp_path) as server:
        query = "&".join(f"run={quote(name)}" for name in names)
        page.goto(f"{server.address.url}?{query}")
        charts_drawn(page)
        expect(page.locator("[data-key=loss] .legendtext")).to_have_text(names)
        assert names[0] in page.evaluate(pointed_at, "loss")
        for name in names:
            page.goto(f"{server.address.url}?run={quote(name)}")
            page.wait_for_selector("[data-key=lanes] .main-svg")
            expect(page.locator("[data-key=lanes] .ytick text")).to_have_text(name)
            assert f"conv_light in {name}: TRAINING" in page.evaluate(pointed_at, "lanes")
        assert page.locator(".charts a").count() == 0


def test_who_listens_is_told_of_ends_and_not_of_every_event(page: Page, tmp_path: Path) -> None:
    with writing(tmp_path / "run") as run, serving(tmp_path) as server:
        page.goto(f"{server.address.url}?run=run")
        for epoch in (1, 2, 3):
            run.tell("skip", epoch, "bad")
            expect(page.locator(".lines li")).to_have_count(epoch)
        assert page.locator("[aria-live]").all_inner_texts() == [""]
        run.tell("finish")
        expect(page.get_by_role("status")).to_have_text("run: finished")


def test_everything_that_can_be_used_has_a_name(page: Page, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    with serving(tmp_path, channel=Channel()) as server:
        for query in ("", "?run=one", "?run=one&run=two"):
            page.goto(server.address.url + query)
            expect(page.locator(".row")).to_have_count(2)
            if query:
                charts_drawn(page)
            nameless = page.evaluate(
                """() => [...document.querySelectorAll("a, button, input, progress, meter, [role]")]
                .filter((item) => !(item.textContent.trim() || item.ariaLabel ||
                  item.labels?.length || item.getAttribute("role") === "status" ||
                  item.closest(".plotly")))
                .map((item) => item.outerHTML)"""
            )
            assert nameless == []


def test_motion_stops_for_who_asks_for_it(browser: Browser, tmp_path: Path) -> None:
    moving = {}
    with writing(tmp_path / "run") as run, serving(tmp_path) as server:
        run.tell("measure", 1, 1.0)
        for wish in ("no-preference", "reduce"):
            page = browser.new_page(reduced_motion=wish)
            page.goto(server.address.url)
            page.wait_for_selector(".status[data-status=running]")
            moving[wish] = page.evaluate("document.getAnimations().length")
            page.close()
    assert moving["no-preference"] > 0
    assert moving["reduce"] == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_as_wide_as_its_window_in_every_view(
    browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    for name in ("digits-1", "digits-2", "search/digits-20261127-081700-123456"):
        write_run(tmp_path / name)
    write_run(tmp_path / "digits-0", finished=False)
    live = RunStore(tmp_path / "live", config=CONFIG, environment={})
    slots = ("stage1", "stage2")
    publish(live, 0, RunStarted(slots=slots, host_param_count=1000))
    for epoch in range(1, 8):
        live.measure(epoch, 10 * epoch, {"loss": 2.0 / epoch, "accuracy": 0.1 * epoch})
    write_life(live, slot="stage2", epoch=2, until="committed")
    write_life(live, slot="stage1", epoch=5)
    publish(live, 6, CheckpointDamaged(name="step-50", error="the seal is broken"))
    skip(live, 7, "loss is nan")
    with serving(tmp_path) as server:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        found = complaints(page)
        for view, query in (
            ("list", ""),
            ("run", "?run=live"),
            ("comparison", "?run=digits-1&run=digits-2&run=live"),
        ):
            page.goto(server.address.url + query)
            expect(page.locator(".row")).to_have_count(5)
            if query:
                charts_drawn(page)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            keep_screenshot(page, f"dashboard-{view}-{width}-{scheme}", tmp_path / "pictures")
        page.close()
    live.close()
    assert found == []
