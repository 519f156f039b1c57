"""The report of the training of a policy: numbers, pictures, and what is left out."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from browser import complaints, keep_screenshot, launched
from esper.report import draw_charts, tell_training, training_charts, training_report
from esper.report.chart import Chart
from esper.report.png import NothingToDrawError
from esper.report.training_story import RETURN, TrainingStory, running_means
from esper.rl.training_report import TrainingReport
from esper.telemetry import RunReader
from esper.telemetry.run_reader import MetricRow
from told_training import STEPS, begin, no_episode, report, tell, write_training

EACH = "mean of a rollout's episodes"
REASON = "worker 1 <ended> by signal 9"
KEYS = [
    *("return", "return-parts", "final-loss", "final-accuracy", "final-committed"),
    *("entropy", "approx_kl", "explained_variance"),
]


def written(folder: Path, *reports: TrainingReport, **options: Any) -> RunReader:
    write_training(folder / "training", reports, **options)
    return RunReader(folder / "training")


def words(page: str) -> str:
    """Return what a page says, its charts left out."""
    body = page.partition("<body>")[2].partition("<script")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def line(charts: Sequence[Chart], key: str, name: str) -> tuple[list[int], list[float]]:
    (chart,) = (chart for chart in charts if chart.key == key)
    (trace,) = (trace for trace in chart.figure["data"] if trace["name"] == name)
    return trace["x"], trace["y"]


def test_page_tells_first_and_last_returns_effort_restarts_and_settings(tmp_path: Path) -> None:
    reports = [report(1, episodes=1), *(report(number, episodes=3) for number in range(2, 8))]
    reader = written(tmp_path, *reports, restarts={4: REASON}, task="<b>digits")
    page = training_report(reader)
    told = words(page)
    # windows of 3 rollouts: (0.85 + 3 * 0.95 + 3 * 1.05) / 7, and (1.25 + 1.35 + 1.45) / 3
    assert "return +1.3500 mean of 3 rollouts, first +0.9786" in told
    assert "decisions 560 of 800, in 7 rollouts" in told
    assert "episodes 19 of 40 decisions" in told
    assert "restarts 1 of environments" in told
    assert "speed 8/s 90% collecting" in told
    assert "time 1 min 10 s" in told
    assert "return, terminal 1.229 1.6 +0.3714" in told
    assert "final seeds committed 1.5 1.5 +0" in told
    assert "320 4 worker 1 &lt;ended&gt; by signal 9" in told
    assert "after imitating heuristic · random seed 3" in told
    assert "training.num_workers 2" in told
    assert "<b>" not in page.partition("<script")[0]
    for nonsense in ("parameters", "seeds of", "gate", "None"):
        assert nonsense not in told
    (data,) = re.findall(r'type="application/json">(.*?)</script>', page, re.DOTALL)
    assert [chart["key"] for chart in json.loads(data)] == KEYS


def test_pictures_show_each_rollout_and_means_in_which_every_episode_counts(
    tmp_path: Path,
) -> None:
    counts = [1, 5, 2, 2, 7, 1, 3, 1]
    reports = [report(number, episodes=count) for number, count in enumerate(counts, start=1)]
    charts = training_charts(tell_training(written(tmp_path, *reports, restarts={3: REASON})))
    returns = [told.mean_return or 0.0 for told in reports]
    each = line(charts, "return", EACH)
    assert each == ([STEPS * number for number in range(1, 9)], returns)
    steps, means = line(charts, "return", "mean of 4 rollouts")
    assert steps == [STEPS * number for number in range(4, 9)]
    for end, mean in enumerate(means, start=4):
        pairs = list(zip(counts, returns, strict=True))[end - 4 : end]
        assert mean == pytest.approx(sum(c * r for c, r in pairs) / sum(c for c, _ in pairs))
    # of the policy, not of episodes: each rollout counts alike
    _, entropies = line(charts, "entropy", "mean of 4 rollouts")
    assert entropies[0] == pytest.approx((2.0 + 1.0 + 2.0 / 3 + 0.5) / 4)
    parts = {trace["name"] for trace in charts[1].figure["data"]}
    assert parts == {"terminal", "parameter rent"}  # diverged never was anything but 0
    assert line(charts, "return-parts", "parameter rent")[1] == pytest.approx([0.0] * 5)
    assert line(charts, "return", "environment restarted") == ([3 * STEPS], [returns[2]])
    draw_charts("training", charts, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_mean_over_a_window_is_that_over_its_rollouts_however_long_a_training_is() -> None:
    assert [_story(number).window for number in (1, 2, 9, 10, 100, 200)] == [1, 1, 4, 5, 5, 10]
    story = _story(200)
    first, last = story.first_and_last(RETURN) or (0.0, 0.0)
    means = running_means(story.rollouts, RETURN, window=story.window)
    assert (means[0][1], means[-1][1]) == pytest.approx((first, last))


def _story(number: int) -> TrainingStory:
    story = TrainingStory()
    for index in range(1, number + 1):
        told = report(index)
        place = {"id": index, "epoch": told.rollout, "step": told.timesteps}
        story.take_values(
            MetricRow(name=name, value=value, **place) for name, value in told.metrics.items()
        )
    return story


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    reader = written(tmp_path / "one", no_episode(1), no_episode(2))
    keys = [chart.key for chart in training_charts(tell_training(reader))]
    assert keys == ["entropy", "approx_kl"]
    assert "No episode has ended yet" in words(training_report(reader))
    # rollouts without an episode are passed over, and are no zeros
    some = tell_training(written(tmp_path / "two", report(1), no_episode(2), report(3)))
    assert line(training_charts(some), "return", EACH)[0] == [STEPS, 3 * STEPS]
    empty = written(tmp_path / "three")
    assert training_charts(tell_training(empty)) == []
    assert "decisions 0 of 800, in 0 rollouts" in words(training_report(empty))
    with pytest.raises(NothingToDrawError, match="nothing was measured yet"):
        draw_charts("none", [], tmp_path / "none.png")


def test_training_that_goes_on_further_than_it_was_begun_for_says_so(tmp_path: Path) -> None:
    reader = written(tmp_path, report(1), report(2, total_steps=3999))
    assert "decisions 160 of 4,000, in 2 rollouts" in words(training_report(reader))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_drawn_in_a_browser_without_a_network(
    tmp_path: Path, scheme: str, width: int
) -> None:
    store = begin(tmp_path / "training")
    for number in range(1, 31):
        tell(store, report(number), *(["killed"] if number == 9 else []))
    file = tmp_path / "report.html"
    file.write_text(training_report(RunReader(tmp_path / "training")), encoding="utf-8")
    store.close()
    with launched() as browser:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
        page = context.new_page()
        found = complaints(page)
        page.goto(file.as_uri())
        page.wait_for_function(
            f"document.querySelectorAll('.plot .main-svg .xtitle').length >= {len(KEYS)}"
        )
        assert page.locator("h1 .chip").inner_text() == "running"
        assert page.locator("figure.chart").count() == len(KEYS)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        keep_screenshot(page, f"training-{width}-{scheme}", tmp_path)
        assert found == []
