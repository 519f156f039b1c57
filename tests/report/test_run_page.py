"""The report of a run, as a file, in a real browser, and on paper."""

import io
import json
import math
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser

from browser import complaints, keep_screenshot, launched
from esper.lifecycle.events import (
    EventRecord,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    SeedBlamed,
    StepSkipped,
    TwinFinished,
)
from esper.lifecycle.words import CHECKS, needed
from esper.report import RunStory, run_report
from esper.report.run_page import duration
from esper.telemetry import RunReader, RunStore
from served_runs import publish, write_life, write_run

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(run_reader: RunReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(run_report(run_reader), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Browser:
    with launched() as browser:
        yield browser


class Text(HTMLParser):
    """Collects what a page says, scripts and styles left out."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self._inside: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._inside.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside and data.strip():
            self.words.append(data.strip())


def test_every_check_of_every_gate_is_in_it(report: Path, story: RunStory) -> None:
    words = Text(report.read_text(encoding="utf-8")).words
    told = " ".join(words)
    checks = [check for seed in story.seeds for v in seed.gates for check in v.event.result.checks]
    assert words.count("passes") + words.count("fails") == len(checks)
    for check in checks:
        assert check.name.replace("_", " ") in words
        assert needed(check) in words
        if check.measured is not None:
            assert f"{check.measured:.4g}" in words
    for seed in story.seeds:
        assert f"{seed.blueprint} in {seed.slot}, epoch {seed.epoch}" in told
        assert seed.reason in told


def test_a_run_that_decides_every_so_many_steps_is_told_in_decisions(tmp_path: Path) -> None:
    write_run(tmp_path / "run", trainer={"epochs": 3, "decision_interval_steps": 10})
    content = run_report(RunReader(tmp_path / "run"))
    words = Text(content).words
    assert "conv_light in stage1, decision 2" in words
    assert "decisions" in words
    assert re.findall(r"\S*epochs?\b", " ".join(words)) == ["trainer.epochs"]
    assert "epoch 2" not in content, "nor in a chart"


def test_a_check_says_what_it_measures_to_who_points_at_it(report: Path) -> None:
    content = report.read_text(encoding="utf-8")
    for name in ("gradient_ratio", "over_linear_fraction"):
        meaning = escape(CHECKS[name])
        assert f'<abbr title="{meaning}">{name.replace("_", " ")}</abbr>' in content
    assert f'refused: <abbr title="{escape(CHECKS["gradient_ratio"])}">' in content, "also as why"


def test_refusals_are_counted_in_words(report: Path, story: RunStory) -> None:
    told = " ".join(Text(report.read_text(encoding="utf-8")).words)
    counts = [sum(not visit.event.result.passed for visit in seed.gates) for seed in story.seeds]
    for count in counts:
        assert {0: "never refused", 1: "refused once"}.get(count, f"refused {count} times") in told
    assert {0, 1} & set(counts)
    assert "1 times" not in told


@pytest.mark.parametrize(
    ("started", "finished", "told"),
    [
        (True, True, "parameters 1,000 from 700, +43 %; +300 still growing, not tested"),
        (True, False, "parameters 1,000 from 700, +43 %"),
        (False, True, "parameters 1,000 +300 still growing, not tested"),
        (False, False, None),
    ],
)
def test_the_size_is_of_what_was_tested_and_none_is_told_that_is_not_known(
    started: bool, finished: bool, told: str | None, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    if started:
        publish(store, 0, RunStarted(slots=("a",), host_param_count=700))
    write_life(store, slot="a", epoch=1)
    if finished:
        publish(store, 3, RunFinished(metrics={"loss": 0.5}, param_count=1000))
    store.close()
    words = " ".join(Text(run_report(RunReader(tmp_path / "run"))).words)
    figures, _, _ = words.partition("Seeds")
    assert (told in figures) if told else ("parameters" not in figures)


def test_why_a_run_ended_is_in_it_unless_it_went_on(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    events = (
        RunStarted(slots=("a",), host_param_count=10),
        RunFailed(error="ValueError: <no> batch"),
        RunResumed(name="step-00000000"),
    )
    told = []
    for event in events:
        store.publish(EventRecord(time_seconds=1.0, epoch=0, step=0, event=event))
        told.append(run_report(RunReader(tmp_path / "run")))
    store.close()
    assert ["Why it ended" in page for page in told] == [False, True, False]
    assert "ValueError: &lt;no&gt; batch" in told[1]


def test_it_needs_nothing_from_anywhere(report: Path) -> None:
    assert Text(report.read_text(encoding="utf-8")).addresses == []


def test_what_the_governor_did_is_in_it_and_names_cannot_break_the_page(tmp_path: Path) -> None:
    name = "</script><b>x"
    store = RunStore(tmp_path / "run", config={"task": name}, environment={"note": name})
    for step, event in enumerate(
        [
            RunStarted(slots=(name,), host_param_count=3),
            StepSkipped(reason="loss is not finite", value=float("nan")),
            SeedBlamed(slot=name, blueprint="mlp", loss=9.0, loss_without=0.5),
        ]
    ):
        store.publish(EventRecord(time_seconds=1e9 + step, epoch=1, step=step, event=event))
    store.measure(1, 3, {"loss": 1.0})
    store.close()
    content = run_report(RunReader(tmp_path / "run"))
    words = Text(content).words
    assert "step 1 skipped: loss is not finite" in words
    assert any("is the fault of bad steps" in word for word in words)
    assert name in words
    assert "<b>" not in content.replace("&lt;b&gt;", "").partition("<script id=")[0]
    (data,) = re.findall(r'type="application/json">(.*?)</script>', content, re.DOTALL)
    assert json.loads(data)[0]["key"] == "loss"


@pytest.mark.parametrize(
    ("loss", "twins", "told"),
    [
        (0.4, 0.5, "growth paid|20.0% below that of its twin"),
        (0.6, 0.5, "growth did not pay|20.0% above that of its twin"),
        (-1.2, -1.0, "growth paid|20.0% below that of its twin"),
        (-0.9, -1.0, "growth did not pay|10.0% above that of its twin"),
        (0.1, 0.0, "growth did not pay|0.1 above that of its twin"),
        (math.nan, 0.5, "whether growth paid cannot be told|nan, and 0.5 is that of its twin"),
        (0.5, math.inf, "whether growth paid cannot be told|0.5, and inf is that of its twin"),
    ],
)
def test_whether_growth_paid_is_told_of_any_losses(
    loss: float, twins: float, told: str, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    for event in [
        RunStarted(slots=(), host_param_count=3),
        RunFinished(metrics={"loss": loss}, param_count=3),
        TwinFinished(
            metrics={"loss": twins}, param_count=3, epochs=1, shared_steps=1, flops_fraction=1.0
        ),
    ]:
        store.publish(EventRecord(time_seconds=1e9, epoch=1, step=1, event=event))
    store.close()
    words = Text(run_report(RunReader(tmp_path / "run"))).words
    verdict, sentence = told.split("|")
    (place,) = (at for at, word in enumerate(words) if word == verdict)
    assert words[place + 1].startswith(f"The grown network's test loss is {sentence}, which")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-3700.0, "0 s"), (0.4, "0 s"), (59.6, "1 min 0 s"), (3725.0, "1 h 2 min")],
)
def test_a_time_is_told_in_its_two_largest_units_and_is_never_below_zero(
    seconds: float, told: str
) -> None:
    assert duration(seconds) == told


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_is_drawn_in_a_browser_without_a_network(
    browser: Browser, report: Path, scheme: str, size: dict, tmp_path: Path
) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    page = context.new_page()
    found = complaints(page)
    page.goto(report.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    figures = page.locator("figure.chart")
    assert figures.count() == 5
    for index in range(figures.count()):
        label = figures.nth(index).locator("[role=img]").get_attribute("aria-label")
        assert label is not None
        assert len(label) > 30
    ink = page.evaluate("getComputedStyle(document.body).color")
    drawn = page.locator("figure.chart .xtitle").first.evaluate("node => node.style.fill")
    assert drawn == ink  # charts take the page's colours
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.plot svg')]"
        ".map(plot => plot.getBoundingClientRect().right))"
    )
    assert right <= size["width"]
    keep_screenshot(page, f"report-{size['width']}-{scheme}", tmp_path)
    assert found == []
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_has_a_shadow_at_an_edge_behind_which_it_goes_on(
    browser: Browser, report: Path, scheme: str
) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.goto(report.as_uri())
    seeds = page.locator(".table").first
    card = page.locator(".card:has(.table)").first

    def shaded() -> tuple[bool, bool]:
        """Whether the left and the right edge are of another colour than the card."""
        shown = Image.open(io.BytesIO(seeds.screenshot())).convert("RGB")
        colour = card.evaluate("node => getComputedStyle(node).backgroundColor")
        plain = tuple(map(int, re.findall(r"\d+", colour)))
        left, right = (shown.getpixel((x, 3)) for x in (1, shown.width - 3))
        return left != plain, right != plain

    assert shaded() == (False, True)
    seeds.evaluate("node => node.scrollTo(node.scrollWidth, 0)")
    assert shaded() == (True, False)
    page.close()


@pytest.mark.browser
def test_colours_follow_the_system_while_it_is_open(browser: Browser, report: Path) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(report.as_uri())
    title = page.locator("figure.chart .xtitle").first
    light = title.evaluate("node => node.style.fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "light => document.querySelector('figure.chart .xtitle').style.fill !== light", arg=light
    )
    page.close()


@pytest.mark.browser
def test_on_paper_everything_is_unfolded_and_fits(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport=WIDE, color_scheme="dark")
    page.goto(report.as_uri())
    page.locator("figure.chart .xtitle").first.wait_for()
    page.set_viewport_size({"width": 700, "height": 900})
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function("[...document.querySelectorAll('details')].every(each => each.open)")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.wait_for_function(
        "[...document.querySelectorAll('.plot svg')]"
        ".every(plot => plot.getBoundingClientRect().right <= 700)"
    )
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
