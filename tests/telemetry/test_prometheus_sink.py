"""What Prometheus scrapes of a run, over HTTP, as its own parser reads it."""

import math
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper.lifecycle.events import RunWentBack
from esper.lifecycle.stages import SeedStage
from esper.telemetry import PrometheusSink, TrackerError
from tracked_run import COMMITTED, PRUNED, SLOT, alpha_reached, health, record, stage, tell_run

Series = tuple[str, frozenset[tuple[str, str]]]

IN_SLOT = {"slot": SLOT}


@pytest.fixture
def endpoint() -> Iterator[PrometheusSink]:
    with PrometheusSink(port=0, name="first") as sink:
        yield sink


def scrape(sink: PrometheusSink) -> dict[Series, float]:
    with urllib.request.urlopen(sink.place, timeout=10) as answer:  # noqa: S310 – our own
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def series(name: str, **labels: str) -> Series:
    return name, frozenset(labels.items())


def test_newest_values_are_scraped(endpoint: PrometheusSink) -> None:
    tell_run(endpoint)
    samples = scrape(endpoint)
    assert samples[series("esper_run_info", run="first")] == 1.0
    assert samples[series("esper_loss")] == 0.5
    assert samples[series("esper_top_5__")] == 0.5
    assert samples[series("esper_test_loss")] == 0.25
    assert samples[series("esper_param_count")] == 120.0
    assert (samples[series("esper_epoch")], samples[series("esper_step")]) == (3.0, 30.0)
    assert samples[series("esper_alpha", **IN_SLOT)] == 1.0
    assert samples[series("esper_gradient_ratio", **IN_SLOT)] == 0.5
    assert samples[series("esper_contribution_fraction", **IN_SLOT)] == 0.1
    assert samples[series("esper_stage", **IN_SLOT, esper_stage="blending")] == 1.0
    assert samples[series("esper_stage", **IN_SLOT, esper_stage="training")] == 0.0
    assert samples[series("esper_events_total", type="step_skipped")] == 1.0
    assert samples[series("esper_updated_timestamp_seconds")] > 1e9


def test_nan_is_served_as_nan(endpoint: PrometheusSink) -> None:
    endpoint.measure(1, 10, {"loss": math.nan})
    assert math.isnan(scrape(endpoint)[series("esper_loss")])


@pytest.mark.parametrize(("end", "word"), [(PRUNED, "pruned"), (COMMITTED, "committed")])
def test_an_ended_seed_is_counted_and_its_values_are_gone(
    endpoint: PrometheusSink, end: Any, word: str
) -> None:
    tell_run(endpoint, end)
    samples = scrape(endpoint)
    assert samples[series(f"esper_seeds_{word}_total", **IN_SLOT)] == 1.0
    assert series("esper_alpha", **IN_SLOT) not in samples
    assert series("esper_gradient_ratio", **IN_SLOT) not in samples


def test_a_slot_is_served_as_it_stood_at_the_step_that_a_run_goes_back_to(
    endpoint: PrometheusSink,
) -> None:
    for told in (
        *(stage(10, SeedStage.TRAINING, SeedStage.BLENDING), alpha_reached(10, 0.25)),
        *(stage(14, SeedStage.BLENDING, SeedStage.SHADOWING), alpha_reached(14), health(14)),
        PRUNED,
    ):
        endpoint.publish(told)
    for to_step, there, alpha in ((12, "blending", 0.25), (5, "training", None)):
        went_back = RunWentBack(from_step=20, to_step=to_step, same_batches=True)
        endpoint.publish(record(to_step, went_back))
        samples = scrape(endpoint)
        assert samples[series("esper_stage", **IN_SLOT, esper_stage=there)] == 1.0
        assert samples.get(series("esper_alpha", **IN_SLOT)) == alpha
        assert series("esper_gradient_ratio", **IN_SLOT) not in samples


def test_the_number_of_series_does_not_grow_with_the_run(endpoint: PrometheusSink) -> None:
    tell_run(endpoint, PRUNED)
    before = set(scrape(endpoint))
    for _ in range(20):
        tell_run(endpoint, PRUNED)
    assert set(scrape(endpoint)) == before


def test_metrics_that_are_one_name_to_prometheus_are_all_served(endpoint: PrometheusSink) -> None:
    endpoint.measure(1, 10, {"a-b": 1.0, "a_b": 2.0, "a.b": 3.0, "a+b": 4.0, "after": 5.0})
    samples = scrape(endpoint)
    names = ("esper_a_b", "esper_measured_a_b", "esper_measured_a_b_2", "esper_measured_a_b_3")
    assert [samples[series(name)] for name in (*names, "esper_after")] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_metric_with_a_name_that_is_taken_gets_another_one(endpoint: PrometheusSink) -> None:
    endpoint.publish(stage(1, SeedStage.DORMANT, SeedStage.GERMINATED))
    endpoint.publish(alpha_reached(1, 0.25))
    endpoint.measure(1, 10, {"alpha": 7.0, "step": 8.0})
    samples = scrape(endpoint)
    assert samples[series("esper_alpha", **IN_SLOT)] == 0.25
    assert samples[series("esper_measured_alpha")] == 7.0
    assert samples[series("esper_measured_step")] == 8.0


def test_a_port_in_use_is_refused_and_free_again_after_close() -> None:
    with PrometheusSink(port=0) as first:
        port = first.port
        with pytest.raises(TrackerError, match=rf"127\.0\.0\.1:{port}.*choose another port"):
            PrometheusSink(port=port)
    PrometheusSink(port=port).close()
