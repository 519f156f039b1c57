"""The twin of a run: the same run until something germinates, then as many operations without."""

import math
from collections.abc import Container, Mapping
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from torch import Tensor

from drawing_task import ADDRESS
from esper.experiments import GrowingRun, RunConfig, build_setup, load_run_config, prepare
from esper.experiments.audit import ForkPoint, Twin, prepare_twin
from esper.lifecycle.events import EventRecord, SeedGerminated, TwinFinished

EPOCH_STEPS = 20
GERMINATES_AFTER = 2


def config(task: str = "digits", **settings: object) -> RunConfig:
    heuristic = {"warmup_epochs": GERMINATES_AFTER, "plateau_epochs": 1, "plateau_fraction": 1.0}
    options = {"trainer": {"epochs": 6}, "warmup_fraction": 0.25, "heuristic": heuristic}
    return load_run_config(task, None, (), {**options, **settings})


class Watch:
    """Keeps the host's state as it was at the first germination, and every event."""

    def __init__(self) -> None:
        self.run: GrowingRun | None = None
        self.events: list[EventRecord] = []
        self.state: Mapping[str, Tensor] = {}

    def publish(self, record: EventRecord) -> None:
        self.events.append(record)
        if isinstance(record.event, SeedGerminated) and not self.state:
            assert self.run is not None
            self.state = state_of(self.run)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...


def state_of(run: GrowingRun) -> dict[str, Tensor]:
    """The host's parameters, buffers and moments."""
    binding = run.growth.slots.binding
    assert binding is not None
    named = dict(run.setup.model.named_parameters())
    moments = {
        f"{name}.{key}": value.clone()
        for name, parameter in named.items()
        for key, value in binding.optimizer.state.get(parameter, {}).items()
    }
    kept = {
        name: value.clone()
        for name, value in run.setup.model.state_dict().items()
        if "esper_slot" not in name
    }
    return {**kept, **moments}


def twin_of(
    settings: RunConfig, watch: Watch, bad_losses: Container[int] = ()
) -> tuple[GrowingRun, ForkPoint, Twin]:
    setup, numbers = build_setup(settings), count(1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return setup.loss(output, target) * (math.nan if next(numbers) in bad_losses else 1)

    run = prepare(settings, sinks=[watch], setup=replace(setup, loss=loss))
    watch.run = run
    fork = ForkPoint(run.growth)
    *_, last = run.reports
    run.finish()
    return run, fork, prepare_twin(settings, run, last.cost, fork)


@pytest.mark.parametrize("task", ["digits", ADDRESS])
def test_a_twin_is_the_same_run_to_the_bit_until_something_germinates(task: str) -> None:
    watch = Watch()
    _, fork, twin = twin_of(config(task), watch)
    assert fork.step == twin.shared_steps == GERMINATES_AFTER * EPOCH_STEPS
    assert twin.config.trainer.epochs > 6, "and is longer than it"
    *_, report = islice(twin.run.reports, GERMINATES_AFTER)
    assert report.step == fork.step
    there, here = watch.state, state_of(twin.run)
    assert any("exp_avg" in name for name in here)
    assert here.keys() <= there.keys(), "the seed's own come on top"
    for name, value in here.items():
        assert torch.equal(value, there[name]), name


def test_a_twin_has_as_many_operations_and_ends_its_learning_rate_with_them() -> None:
    watch = Watch()
    run, _, twin = twin_of(config(), watch)
    *_, last = twin.run.reports
    event = twin.finish(last.cost, run)
    half_an_epoch = 0.5 / twin.config.trainer.epochs
    assert event.flops_fraction == pytest.approx(1.0, abs=1.01 * half_an_epoch)
    assert event.epochs == twin.config.trainer.epochs
    assert event.metrics["loss"] == pytest.approx(twin.run.setup.test()["loss"])
    assert watch.events[-1].event == event
    assert isinstance(event, TwinFinished)
    binding = twin.run.growth.slots.binding
    assert binding is not None
    assert binding.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert twin.run.growth.step == EPOCH_STEPS * event.epochs


@pytest.mark.parametrize(
    ("bad_losses", "germinates_at", "steps"),
    [
        pytest.param({30, 31, 32}, 40, 120, id="to the same batches"),
        pytest.param({30, 31, 32, 62, 63, 64}, 28, 88, id="then to others"),
    ],
)
def test_a_twin_has_the_operations_of_a_run_that_went_back_before_anything_germinated(
    bad_losses: set[int], germinates_at: int, steps: int
) -> None:
    run, fork, twin = twin_of(config(), Watch(), bad_losses)
    assert (fork.step, run.growth.step) == (germinates_at, steps)
    *_, last = twin.run.reports
    half_an_epoch = 0.5 / twin.config.trainer.epochs
    assert last.cost.training.flops == pytest.approx(twin.grown_flops, rel=1.01 * half_an_epoch)
    assert twin.shared_steps == germinates_at


@pytest.mark.parametrize(
    ("settings", "shared_steps"),
    [
        ({"schedule": "cosine", "warmup_fraction": 0.0}, 1),
        ({"schedule": "constant"}, GERMINATES_AFTER * EPOCH_STEPS),
        ({"decay_fraction": 0.9, "warmup_fraction": 0.0}, 13),
    ],
)
def test_it_is_told_for_how_long_the_learning_rate_is_the_same(
    settings: dict[str, object], shared_steps: int
) -> None:
    """The run has 120 steps: a last share of 0.9 begins to fall after step 12."""
    _, fork, twin = twin_of(config(**settings), Watch())
    assert fork.step == GERMINATES_AFTER * EPOCH_STEPS
    assert twin.shared_steps == shared_steps


def test_what_has_no_twin_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing germinated"):
        twin_of(config(policy="none"), Watch())
    run = prepare(config(count_flops=False))
    with pytest.raises(ValueError, match="count_flops=true"):
        ForkPoint(run.growth)
