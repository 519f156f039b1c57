"""What a run's pictures show, told from the run's own records."""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from esper.lifecycle.alpha import AlphaCurve, BlendOperator
from esper.lifecycle.events import (
    ContributionMeasured,
    Event,
    EventRecord,
    GateEvaluated,
    GradientHealthMeasured,
    RunStarted,
    SeedGerminated,
    StageChanged,
)
from esper.lifecycle.gates import Gate, GateInputs, GateThresholds, evaluate_gate
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.stages import SeedStage
from esper.report import (
    Chart,
    Reference,
    RunStory,
    StoryTeller,
    draw_charts,
    new_figure,
    png,
    run_charts,
    tell,
)
from esper.report.chart import STAGE_COLOURS, json_values, log_axis, si
from esper.report.seed_charts import contribution_chart, gradient_chart
from esper.report.story import AlphaRamp
from esper.telemetry import RunReader
from esper.telemetry.run_reader import MetricRow


@pytest.fixture(scope="module")
def charts(run_reader: RunReader, story: RunStory) -> dict[str, Chart]:
    return {chart.key: chart for chart in run_charts(story, run_reader.metrics())}


def traces(chart: Chart) -> dict[str, dict]:
    return {trace["name"]: trace for trace in chart.figure["data"]}


def test_every_kind_of_picture_is_there(charts: dict[str, Chart]) -> None:
    assert list(charts) == ["loss", "lanes", "contribution", "gradient", "size"]


def test_curves_are_the_stored_metrics(charts: dict[str, Chart], run_reader: RunReader) -> None:
    rows = [row for row in run_reader.metrics() if row.name == "loss"]
    drawn = traces(charts["loss"])["held out"]
    assert drawn["x"] == [row.step for row in rows]
    assert drawn["y"] == [row.value for row in rows]


def test_growth_is_marked_on_the_curve(charts: dict[str, Chart], story: RunStory) -> None:
    drawn = traces(charts["loss"])
    assert drawn["germinated"]["x"] == [seed.step for seed in story.seeds]
    assert drawn["committed"]["x"] == [story.seeds[0].end_step]
    assert drawn["pruned"]["x"] == [story.seeds[1].end_step]
    curve = dict(zip(drawn["held out"]["x"], drawn["held out"]["y"], strict=True))
    for step, value in zip(drawn["committed"]["x"], drawn["committed"]["y"], strict=True):
        assert value == pytest.approx(curve[step])


def test_lanes_cover_each_life_without_gap_or_overlap(
    charts: dict[str, Chart], story: RunStory
) -> None:
    bars = sorted(
        (start, start + length)
        for trace in charts["lanes"].figure["data"]
        if trace["type"] == "bar" and trace["name"] != "in the host"
        for start, length in zip(trace["base"], trace["x"], strict=True)
    )
    for (_, before), (after, _) in itertools.pairwise(bars):
        assert before <= after
    lived = sum((seed.end_step or story.last_step) - seed.step for seed in story.seeds)
    assert sum(end - start for start, end in bars) == lived


def test_a_lane_goes_on_palely_from_a_commit_to_the_end_of_the_run(
    charts: dict[str, Chart], story: RunStory
) -> None:
    drawn = charts["lanes"].figure["data"]
    held = traces(charts["lanes"])["in the host"]
    (start,), (length,) = held["base"], held["x"]
    assert (start, start + length) == (story.seeds[0].end_step, story.last_step)
    assert held["opacity"] < 1.0
    assert drawn[0] is held, "what grows there later is drawn over it"


def test_a_run_that_did_not_say_how_it_began_is_drawn_but_for_its_size(
    run_reader: RunReader,
) -> None:
    records = [r for r in run_reader.events() if not isinstance(r.event, RunStarted)]
    charts = run_charts(tell(records), run_reader.metrics())
    assert [chart.key for chart in charts] == ["loss", "lanes", "contribution", "gradient"]
    assert all(chart.figure["data"] for chart in charts)


def test_alpha_is_drawn_inside_its_lane(charts: dict[str, Chart]) -> None:
    line = traces(charts["lanes"])["alpha"]
    heights = [y for y in line["y"] if y is not None]
    alphas = [alpha for alpha in line["customdata"] if alpha is not None]
    assert min(alphas) == 0.0
    assert max(alphas) == 1.0
    assert min(heights) == pytest.approx(-0.32)
    assert max(heights) == pytest.approx(0.32)
    assert len(set(alphas)) > 5  # a ramp, and no jump


def test_what_seeds_saved_is_what_was_measured(charts: dict[str, Chart], story: RunStory) -> None:
    drawn = traces(charts["contribution"])["embed"]
    measured = [
        100.0 * visit.event.contribution_fraction
        for seed in story.seeds
        for visit in seed.contributions
    ]
    assert [value for value in drawn["y"] if value is not None] == measured
    assert drawn["x"].count(None) >= 1  # lives are not joined


@pytest.mark.parametrize(
    ("fractions", "told"),
    [
        ((math.nan,), "bars are one standard error."),
        ((-0.2, math.nan), "the most is saved by norm in a, epoch 0: -20.0 %."),
        ((math.nan, -0.2, -0.1), "the most is saved by norm in c, epoch 0: -10.0 %."),
    ],
)
def test_summary_names_who_saves_most_of_those_of_whom_it_is_known(
    fractions: tuple[float, ...], told: str
) -> None:
    chart = contribution_chart(weighed(dict(zip("abc", fractions, strict=False))))
    assert chart is not None
    assert chart.summary.endswith(told)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (None, "per parameter. Here from 2 to 2."),
        ((1e-4, 1e3), "below 0.0001 a seed learns nothing, above 1,000 it explodes. Here"),
        ((0.5, 20.0), "below 0.5 a seed learns nothing, above 20 it explodes. Here"),
    ],
)
def test_gradients_are_told_beside_what_the_run_asks_of_them(
    limits: tuple[float, float] | None, told: str
) -> None:
    measured = GradientHealthMeasured(
        slot="a",
        host_norm=1.0,
        seed_norm=2.0,
        ratio=2.0,
        nonfinite_steps=0,
        vanishing=False,
        exploding=False,
    )
    teller = StoryTeller()
    for record in [*born("a"), happened(measured)]:
        teller.take(record)
    if limits is not None:
        low, high = limits
        thresholds = GateThresholds(min_gradient_ratio=low, max_gradient_ratio=high)
        result = evaluate_gate(Gate.G2, GateInputs(), thresholds)
        judged = GateEvaluated(
            slot="a", blueprint="norm", to_stage=SeedStage.BLENDING, result=result
        )
        teller.take(happened(judged))
    chart = gradient_chart(teller.story)
    assert chart is not None
    assert told in chart.summary


def born(slot: str) -> list[EventRecord]:
    stage = StageChanged(
        slot=slot, blueprint="norm", from_stage=SeedStage.DORMANT, to_stage=SeedStage.GERMINATED
    )
    germinated = SeedGerminated(
        slot=slot,
        blueprint="norm",
        options={},
        param_count=1,
        blend_operator=BlendOperator.ADD,
        isolation=Isolation.NONE,
        objective=SeedObjective.PROXIMAL,
        prewarm_ms=0.0,
    )
    return [happened(stage), happened(germinated)]


def weighed(fractions: Mapping[str, float]) -> RunStory:
    """Return a story in which a seed in each slot saves a fraction of the loss."""
    records = [happened(RunStarted(slots=tuple(fractions), host_param_count=1))]
    for slot, fraction in fractions.items():
        measured = ContributionMeasured(
            slot=slot,
            stage=SeedStage.BLENDING,
            loss_with=1.0,
            loss_without=1.0,
            contribution_fraction=fraction,
            standard_error_fraction=None,
        )
        records += [*born(slot), happened(measured, step=20)]
    return tell(records)


def happened(event: Event, step: int = 0) -> EventRecord:
    return EventRecord(time_seconds=0.0, epoch=0, step=step, event=event)


def test_size_follows_births_commits_and_prunings(story: RunStory) -> None:
    mlp, noop, lora = story.seeds
    counts = dict(story.param_counts)
    assert counts[0] == 97
    assert counts[mlp.step] == 97 + mlp.param_count
    assert counts[noop.end_step] == 97 + mlp.param_count
    assert counts[lora.step] == 97 + mlp.param_count + lora.param_count


def test_references_stand_beside_the_run(run_reader: RunReader, story: RunStory) -> None:
    references = [
        Reference(label="host", param_count=97, loss=0.5, flops=1e6),
        Reference(label="grown", param_count=120, loss=0.2, loss_half_width=0.1, grown=True),
    ]
    chart = {
        chart.key: chart for chart in run_charts(story, run_reader.metrics(), references=references)
    }["size"]
    drawn = traces(chart)
    assert (drawn["never grew, test"]["x"], drawn["never grew, test"]["text"]) == ([97], ["host"])
    assert drawn["grown, test"]["error_y"]["array"] == [0.1]


def test_losses_of_a_run_that_went_back_stand_at_what_was_spent_by_then() -> None:
    measured: list[tuple[int, dict[str, float]]] = [
        (10, {"loss": 4.0, "flops": 1e6}),
        (10, {"loss": 5.0, "flops": 2e6}),
        (15, {"loss": 3.0}),
        (20, {"flops": 3e6, "loss": 2.0}),
        (30, {"loss": math.nan, "flops": 4e6}),
    ]
    rows = [
        MetricRow(id=0, epoch=0, step=step, name=name, value=value)
        for step, values in measured
        for name, value in values.items()
    ]
    charts = {chart.key: chart for chart in run_charts(RunStory(), rows)}
    drawn = traces(charts["flops"])["held out, darker later"]
    assert list(zip(drawn["x"], drawn["y"], drawn["customdata"], strict=True)) == [
        (1e6, 4.0, 10),
        (2e6, 5.0, 10),
        (3e6, 2.0, 20),
    ]


def test_figures_are_plain_json_without_numbers_that_are_none(charts: dict[str, Chart]) -> None:
    for chart in charts.values():
        json.dumps(chart.as_json(), allow_nan=False)
    assert json_values({"a": [math.nan, 1.0, (math.inf,)]}) == {"a": [None, 1.0, [None]]}


def test_run_without_anything_has_no_picture_and_any_prefix_can_be_drawn(
    run_reader: RunReader,
) -> None:
    assert run_charts(RunStory(), []) == []
    teller, metrics = StoryTeller(), run_reader.metrics()
    for record in run_reader.events():
        teller.take(record)
        known = [row for row in metrics if row.step <= record.step]
        for chart in run_charts(teller.story, known):
            assert chart.summary


def test_diverged_run_can_be_drawn() -> None:
    started = RunStarted(slots=("a",), host_param_count=1)
    story = tell([EventRecord(time_seconds=0.0, epoch=0, step=0, event=started)])
    rows = [
        MetricRow(id=i, epoch=i, step=i, name="loss", value=value)
        for i, value in enumerate((1.0, math.inf, math.nan, -2.0), start=1)
    ]
    (loss,) = run_charts(story, rows)
    assert traces(loss)["held out"]["y"] == [1.0, -2.0]
    assert "type" not in loss.figure["layout"]["yaxis"]  # no logarithm of what is negative


def test_long_curves_keep_their_ends_and_some_thousand_points() -> None:
    rows = [MetricRow(id=i, epoch=i, step=i, name="loss", value=1.0 / i) for i in range(1, 100_001)]
    (loss,) = run_charts(RunStory(), rows)
    drawn = traces(loss)["held out"]
    assert (drawn["x"][0], drawn["x"][-1]) == (1, 100_000)
    assert len(drawn["x"]) <= 2000


@pytest.mark.parametrize("curve", list(AlphaCurve))
def test_ramps_are_drawn_as_they_went(curve: AlphaCurve) -> None:
    ramp = AlphaRamp(step=10, from_alpha=0.2, target=1.0, steps=100, curve=curve)
    points = ramp.points(60)
    assert points[0] == (10, 0.2)
    assert max(step for step, _ in points) < 60
    whole = ramp.points(500)
    assert whole[-1] == (110, 1.0)
    assert [alpha for _, alpha in whole] == sorted(alpha for _, alpha in whole)
    halfway = min(whole, key=lambda point: abs(point[0] - 60))
    assert halfway[1] == pytest.approx(0.6, abs=0.05)


def test_axis_has_ticks_that_can_be_told_apart() -> None:
    within_a_decade = log_axis("loss", [0.6, 2.0])
    assert within_a_decade["ticktext"][:5] == ["0.1", "0.2", "0.3", "0.5", "0.7"]
    assert within_a_decade["title"] == {"text": "loss (log)"}
    assert log_axis("loss", [0.03, 2.0])["ticktext"][:4] == ["0.01", "0.02", "0.05", "0.1"]
    assert log_axis("loss", [0.01, 2.0])["ticktext"][:4] == ["0.01", "0.03", "0.1", "0.3"]
    assert log_axis("loss", [1e-6, 1.0])["ticktext"][:2] == ["1e-06", "1e-05"]
    for values in ([0.0, 1.0], [], [math.inf]):
        assert log_axis("loss", values) == {"title": {"text": "loss"}}


@pytest.mark.parametrize("lowest", [0.021, 1.01, 1.1, 2.25, 9.1e9])
def test_every_axis_has_numbers_among_its_values(lowest: float) -> None:
    assert "type" not in log_axis("loss", [lowest, 1.3 * lowest]), "linear, with ticks that suit it"
    ticks = log_axis("loss", [lowest, 3.0 * lowest])["tickvals"]
    assert len([tick for tick in ticks if lowest <= tick <= 3.0 * lowest]) > 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0"),
        (999.0, "999"),
        (999.6, "1 k"),
        (1500.0, "1.5 k"),
        (1.5e10, "15 G"),
        (2e21, "2e+03 E"),
    ],
)
def test_large_numbers_have_a_prefix(value: float, told: str) -> None:
    assert si(value) == told


def test_every_stage_of_a_life_has_a_colour_of_its_own() -> None:
    waits = {SeedStage.DORMANT, SeedStage.EMBARGOED, SeedStage.RESETTING, SeedStage.TERMINATED}
    assert set(STAGE_COLOURS) == set(SeedStage) - waits
    assert len(set(STAGE_COLOURS.values())) == len(STAGE_COLOURS)


def test_charts_are_drawn_as_one_png_too(charts: dict[str, Chart], tmp_path: Path) -> None:
    target = tmp_path / "run.png"
    draw_charts("a run", list(charts.values()), target)
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    draw_charts("a run", [charts["loss"]], f"{tmp_path}/loss.png")
    alone = (tmp_path / "loss.png").read_bytes()
    assert int.from_bytes(alone[16:20], "big") == width
    assert int.from_bytes(alone[20:24], "big") < height / 2
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_charts("nothing", [], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


@pytest.mark.parametrize("num_slots", [2, 12])
def test_a_png_names_each_slot_as_it_is_and_above_its_own_chart(
    num_slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = ["_blocks.0", r"$\frac$", *(f"model.layers.{number}" for number in range(num_slots))]
    drawn: list[Any] = []

    def kept(width: float, height: float) -> Any:
        drawn.append(new_figure(width, height))
        return drawn[-1]

    monkeypatch.setattr(png, "new_figure", kept)
    grown, saving = run_charts(weighed(dict.fromkeys(slots, 0.1)), [])
    draw_charts("a $run$", [grown, saving, saving], tmp_path / "run.png")
    lanes, saved, _ = drawn[0].axes
    assert [label.get_text() for label in lanes.get_yticklabels()] == slots
    assert [text.get_text() for text in saved.get_legend().get_texts()] == slots
    for axes in drawn[0].axes:
        legend, under = axes.get_legend().get_window_extent(), axes.get_window_extent()
        title = axes._left_title.get_window_extent()
        assert legend.x1 <= under.x1
        assert under.y1 <= legend.y0 < legend.y1 <= title.y0


def test_slots_of_one_colour_have_marks_of_their_own() -> None:
    chart = contribution_chart(weighed({f"layer.{number}": 0.1 for number in range(28)}))
    assert chart is not None
    marks = [(line["marker"]["color"], line["marker"]["symbol"]) for line in chart.figure["data"]]
    assert len(set(marks)) == 28
