"""Which runs a comparison makes, and what it says: worlds in which the answer is known."""

import json
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from browser import launched
from esper.cli.compare_views import LiveCompareView, print_comparison, summary_record
from esper.experiments import load_run_config
from esper.experiments.comparison import (
    CompareConfig,
    Comparison,
    Outcome,
    Outlook,
    RunRequest,
    RunResult,
    at_equal_flops,
    comparison_charts,
    comparison_report,
    judge,
    plan,
    summarise,
)
from esper.experiments.comparison.curves import curve_of, losses_at
from esper.experiments.comparison.runs import GrownSeed
from esper.lifecycle.alpha import BlendOperator
from esper.slots.committed_seed import CommittedSeed

EPOCHS = 100
BEST_RATE = 0.01


def grown_seed(number: int) -> GrownSeed:
    seed = CommittedSeed(
        blueprint="conv_heavy",
        options={"number": number},
        blend_operator=BlendOperator.ADD,
        param_count=10,
        contribution_fraction=0.1,
    )
    return GrownSeed(slot="stage1", seed=seed)


@dataclass(frozen=True)
class World:
    """Losses by size and compute: a law that all networks obey, and what growth adds to it."""

    growth_bonus: float = 0.0
    """Loss that a grown network saves beside one of its size that never grew."""
    num_seeds: Callable[[int], int] = lambda _: 3
    """Seeds that the default commits, by random seed."""
    noise: float = 0.002

    def make(self, request: RunRequest) -> RunResult:
        """Return what a run would have come to."""
        grows = request.policy != "none" or request.at_random_times
        seed = request.random_seed
        committed = (
            tuple(map(grown_seed, range(self.num_seeds(seed))))
            if request.policy != "none"
            else request.topology
        )
        size = 1.0 + len(committed)
        flops = request.epochs * (0.8 if grows else 1.0) * size * 1e6
        draw = random.Random(request.key).gauss(0.0, self.noise)
        missed = 0.05 * abs(math.log2(request.learning_rate / BEST_RATE))
        loss = 1.0 - 0.05 * math.log2(size) - 0.05 * math.log2(request.epochs / EPOCHS) + missed
        loss += draw + 0.1 * seed - (self.growth_bonus if request.policy != "none" else 0.0)
        return RunResult(
            request=request,
            param_count=round(100 * size),
            steps=request.epochs,
            flops=flops,
            seconds=flops / 1e6,
            training_flops=flops * (0.9 if grows else 1.0),
            validation={"loss": loss, "accuracy": 0.5},
            test={"loss": loss, "accuracy": 0.5},
            committed=committed,
            num_germinated=len(committed),
            num_pruned=0,
        )


@cache
def config(seeds: int = 5, *, epochs: int = EPOCHS, **settings: object) -> CompareConfig:
    run = load_run_config(
        "digits", None, [], {"learning_rate": BEST_RATE, "trainer": {"epochs": epochs}}
    )
    return CompareConfig(run=run, random_seeds=tuple(range(seeds)), **settings)


def played(
    world: World,
    settings: CompareConfig,
    *,
    at_a_time: int = 1000,
    kept: Iterable[RunResult] = (),
) -> Comparison:
    """Return the comparison after every run that it asked for, some of which may be kept."""
    comparison = Comparison(settings, kept)
    while missing := comparison.missing():
        made = map(world.make, missing[:at_a_time])
        comparison = Comparison(settings, [*comparison.results.values(), *made])
        assert len(comparison.results) < 400, "a comparison must come to an end"
    return comparison


def test_every_arm_is_there_with_equal_budgets() -> None:
    comparison = played(World(), config(policies=("random",)))
    assert comparison.arms == [
        *("host", "static 1", "static 2", "static", "grown", "random times", "policy random")
    ]
    for arm in comparison.arms:
        assert len(comparison.rates(arm)) == 3, arm
        assert comparison.chosen_rate(arm) == BEST_RATE, arm
        assert comparison.at_equal_steps(arm).keys() == set(range(5)), arm
    assert not comparison.ahead()


def test_arms_are_also_compared_at_equal_flops() -> None:
    comparison = played(World(), config())
    static, grown = comparison.at_equal_steps("static"), comparison.at_equal_steps("grown")
    for arm in ("host", "static 1", "grown", "random times"):
        for seed, runs in comparison.runs(arm).items():
            nearest = min(runs, key=lambda run: abs(run.flops - static[seed].flops))
            assert nearest.flops == pytest.approx(static[seed].flops, rel=0.02), arm
    for seed, runs in comparison.runs("static").items():
        assert runs[0].request.epochs < EPOCHS, "cut short"
        assert runs[0].flops == pytest.approx(grown[seed].flops, rel=0.02)


def test_where_growth_is_dear_networks_that_never_grew_get_as_much() -> None:
    """Its probes make the grown network cost half as much again as one of its size."""

    class Dear(World):
        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            factor = 2.0 if request.policy != "none" else 1.0
            return result.model_copy(update={"flops": factor * result.flops})

    comparison = played(Dear(), config())
    grown = comparison.at_equal_steps("grown")
    for arm in ("host", "static 1", "static"):
        for seed, runs in comparison.runs(arm).items():
            assert runs[-1].flops == pytest.approx(grown[seed].flops, rel=0.02), arm
    equal = at_equal_flops(comparison)
    assert equal is not None
    assert equal.same_steps is None, "no size costs as much in as many steps"
    assert any("none can be compared" in reason for reason in judge(comparison).reasons)


def test_probes_and_decisions_count_as_a_cost_of_growing() -> None:
    grown = {summary.arm: summary for summary in summarise(played(World(), config()))}["grown"]
    assert grown.flops_fraction == pytest.approx(0.8), "training alone is 0.72"


def test_an_arm_that_is_ahead_is_shortened_until_it_is_not() -> None:
    far_ahead = played(World(growth_bonus=0.5), config())
    lengths = [[run.request.epochs for run in runs] for runs in far_ahead.runs("grown").values()]
    assert lengths == [[41, 51, 64, 80, 100, 125]] * 5, "a loss of 0.5 takes 1000 times as long"
    ahead = played(World(growth_bonus=0.03, noise=0.0), config())
    lengths = [[run.request.epochs for run in runs] for runs in ahead.runs("grown").values()]
    assert lengths == [[64, 80, 100, 125]] * 5, "2 ** (-0.03 / 0.05) is 0.66"


@pytest.mark.parametrize("epochs", range(1, 7))
def test_however_short_its_runs_a_comparison_comes_to_an_end(epochs: int) -> None:
    comparison = played(World(growth_bonus=0.5), config(epochs=epochs))
    (lengths,) = {
        tuple(run.request.epochs for run in runs) for runs in comparison.runs("grown").values()
    }
    assert lengths[0] == math.ceil(0.4 * epochs)


@dataclass(frozen=True, kw_only=True)
class Saturated(World):
    """The grown size is as good after fewer steps, which makes it better than what was grown."""

    dear: float = 1.03

    def make(self, request: RunRequest) -> RunResult:
        result = super().make(request)
        full = request.policy == "none" and not request.at_random_times and request.topology
        loss = 0.9 if full else result.test["loss"] - 0.1 * request.random_seed
        loss += random.Random(request.key).gauss(0.0, 0.0005)
        dear = 1.0 if request.policy == "none" else self.dear + 0.01 * request.random_seed
        return result.model_copy(
            update={"flops": dear * result.flops, "test": {**result.test, "loss": loss}}
        )


@pytest.mark.parametrize(("epochs", "dear"), [(3, 1.03), (20, 1.03), (30, 1.03), (3, 1.7)])
def test_whole_epochs_are_so_many_that_no_size_falls_short_of_the_grown_ones_operations(
    epochs: int, dear: float
) -> None:
    """Half an epoch of 20 is more than a curve may reach; the run that it made must count."""
    world, settings = Saturated(num_seeds=lambda _: 1, dear=dear), config(epochs=epochs)
    comparison = played(world, settings)
    grown = comparison.at_equal_steps("grown")
    for arm in ("host", "static"):
        assert losses_at(comparison.runs(arm), grown) is not None, arm
    assert at_equal_flops(comparison).rival == "static"
    assert judge(comparison).outcome is not Outcome.PAYS


def test_a_comparison_begun_by_nearest_epochs_goes_on_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, settings = Saturated(num_seeds=lambda _: 1), config(epochs=20)
    with monkeypatch.context() as before:
        before.setattr(plan, "REACH", math.inf)
        kept = played(world, settings).results
    again = played(world, settings, kept=kept.values())
    assert {run.request.arm for key, run in again.results.items() if key not in kept} == {"static"}
    assert at_equal_flops(again).rival == "static"


@pytest.mark.parametrize(("interval", "shortest"), [(1, 4), (6, 6), (10, 10)])
def test_what_grows_is_shortened_only_as_far_as_something_can_be_decided(
    interval: int, shortest: int
) -> None:
    """A world's epoch is a step: a run of fewer steps than the interval would be refused."""
    settings = config(epochs=10)
    trainer = settings.run.trainer.model_copy(update={"decision_interval_steps": interval})
    run = settings.run.model_copy(update={"trainer": trainer})
    settings = settings.model_copy(update={"run": run})
    for world in (World(growth_bonus=0.5), Saturated(dear=6.0)):
        lengths = [
            request.epochs
            for request in (run.request for run in played(world, settings).results.values())
            if request.grows
        ]
        assert min(lengths) >= interval
        if world.growth_bonus:
            assert min(lengths) == shortest


class Bent(World):
    """The host's loss falls at first, and no more: a line between its budgets lies far above it."""

    def make(self, request: RunRequest) -> RunResult:
        result = super().make(request)
        if request.arm != "host" or request.epochs <= EPOCHS:
            return result
        loss = 0.85 + 0.1 * request.random_seed + random.Random(request.key).gauss(0.0, 0.001)
        return result.model_copy(update={"test": {**result.test, "loss": loss}})


@pytest.mark.parametrize("kind", [World, Bent])
def test_the_same_runs_are_made_in_whatever_order_they_end(kind: type[World]) -> None:
    world, settings = kind(growth_bonus=0.03), config(random_times=False)
    together = played(world, settings)
    for at_a_time in (1, 2):
        assert (
            played(world, settings, at_a_time=at_a_time).results.keys() == together.results.keys()
        )


def test_networks_that_never_grew_get_the_grown_ones_operations() -> None:
    """Unless they are found better there by the line through their runs, which lies too high."""
    comparison = played(World(growth_bonus=0.02), config())
    grown = comparison.at_equal_steps("grown")
    for arm in ("host", "static 1", "static 2", "static"):
        for seed, runs in comparison.runs(arm).items():
            nearest = min(runs, key=lambda run: abs(run.flops - grown[seed].flops))
            assert nearest.flops == pytest.approx(grown[seed].flops, rel=0.02), arm
    behind = played(World(growth_bonus=-0.05), config())
    for arm in ("host", "static 1", "static 2"):
        assert {len(runs) for runs in behind.runs(arm).values()} == {2}, arm


def test_a_line_between_budgets_far_apart_does_not_make_growth_pay() -> None:
    comparison = played(Bent(growth_bonus=0.03), config())
    equal = at_equal_flops(comparison)
    assert equal.rival == "host"
    assert equal.any_steps.above_zero
    assert judge(comparison).outcome is Outcome.PAYS_PER_STEP


def test_without_equal_budgets_growth_can_be_found_to_pay_per_step_at_most() -> None:
    comparison = played(World(growth_bonus=0.02), config(equal_flops=False))
    equal = at_equal_flops(comparison)
    assert equal.same_steps is not None
    assert (equal.rival, equal.any_steps) == (None, None)
    verdict = judge(comparison)
    assert verdict.outcome is Outcome.PAYS_PER_STEP
    assert any("no network that never grew was trained with" in r for r in verdict.reasons)


@pytest.mark.parametrize("intermediate_sizes", [True, False])
def test_a_single_seed_has_no_size_in_between_that_it_must_be_better_than(
    *, intermediate_sizes: bool
) -> None:
    settings = config(intermediate_sizes=intermediate_sizes)
    paying = played(World(growth_bonus=0.05, num_seeds=lambda _: 1), settings)
    assert "static 1" not in paying.arms
    assert at_equal_flops(paying).nothing_between
    verdict = judge(paying)
    assert verdict.outcome is Outcome.PAYS
    assert "a single seed was grown, so that there is no size in between" in verdict.reasons


def test_growth_does_not_pay_where_a_cheaper_size_is_better_in_as_many_steps() -> None:
    """All cost nearly the same, and the largest overfits: between sizes a line is no rival."""

    class Overfitting(World):
        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            grows = request.policy != "none"
            size = len(result.committed)
            flops = request.epochs * (1.0 + 0.001 * size) * (1.015 if grows else 1.0) * 1e6
            loss = (1.0, 0.98, 0.99)[size] - (0.002 if grows else 0.0)
            loss += 0.05 * abs(math.log2(request.learning_rate / BEST_RATE))
            loss += random.Random(request.key).gauss(0.0, 0.0005)
            test = {**result.test, "loss": loss}
            return result.model_copy(update={"flops": flops, "validation": test, "test": test})

    comparison = played(Overfitting(num_seeds=lambda _: 2), config(random_times=False))
    equal = at_equal_flops(comparison)
    assert equal.cheaper == "static 1"
    assert equal.same_steps.mean == pytest.approx(0.008, abs=0.001)
    verdict = judge(comparison)
    assert verdict.outcome is Outcome.DOES_NOT_PAY
    assert any("that of static 1, which takes no more" in reason for reason in verdict.reasons)


def test_a_single_seed_on_some_random_seeds_leaves_others_with_a_size_in_between() -> None:
    for num_seeds, outcome in ((1, Outcome.UNDECIDED), (2, Outcome.PAYS)):
        mixed = World(growth_bonus=0.05, num_seeds=lambda seed, n=num_seeds: n if seed else 2)
        assert judge(played(mixed, config())).outcome is outcome


def test_nothing_is_concluded_while_runs_are_missing() -> None:
    results = list(played(World(growth_bonus=0.05), config()).results.values())
    verdict = judge(Comparison(config(), results[:-1]))
    assert verdict.outcome is Outcome.UNDECIDED
    assert list(verdict.reasons) == ["about 1 runs are missing yet"]


def test_what_is_missing_does_not_depend_on_the_order_of_what_is_there() -> None:
    comparison = played(World(), config())
    results = list(comparison.results.values())
    for keep in (7, 20, 33):
        part = results[:keep]
        expected = {request.key for request in Comparison(config(), part).missing()}
        random.Random(keep).shuffle(part)
        assert {request.key for request in Comparison(config(), part).missing()} == expected


def test_static_networks_wait_until_it_is_known_what_grew() -> None:
    missing = Comparison(config(), []).missing()
    assert {request.arm for request in missing} == {"host", "grown"}
    assert missing[0].arm == "grown", "others wait for it"
    comparison = played(World(), config())
    partly = [
        result
        for result in comparison.results.values()
        if result.request.arm == "grown" and result.request.random_seed < 4
    ]
    assert {r.arm for r in Comparison(config(), partly).missing()} == {"host", "grown"}


def test_learning_rates_are_searched_on_the_first_seeds_alone() -> None:
    for count in (1, 2):
        comparison = played(World(), config(search_seeds=count, equal_flops=False))
        for arm in comparison.arms:
            tried = dict.fromkeys(range(5), 0)
            for result in comparison.results.values():
                tried[result.request.random_seed] += result.request.arm == arm
            assert tried == {seed: 3 if seed < count else 1 for seed in range(5)}, arm


def test_growth_that_pays_is_found_to_pay() -> None:
    comparison = played(World(growth_bonus=0.01), config())
    verdict = judge(comparison)
    assert verdict.outcome is Outcome.PAYS, verdict.reasons
    grown = {summary.arm: summary for summary in summarise(comparison)}["grown"]
    assert grown.flops_to_static is not None
    expected = 0.8 * 2 ** (-0.01 / 0.05)
    assert grown.flops_to_static.ratio == pytest.approx(expected, rel=0.05)
    assert f"{grown.flops_to_static.ratio:.2f} of its FLOPs" in verdict.reasons[1]


def test_no_share_is_told_where_what_grew_was_not_run_at_a_cost_in_common() -> None:
    class Unlike(World):
        """Growth is the cheaper the higher the random seed, and behind."""

        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            factor = 1.0 - 0.1 * request.random_seed if request.policy != "none" else 1.0
            costs = {"flops": factor * result.flops, "seconds": factor * result.seconds}
            return result.model_copy(update=costs)

    comparison = played(Unlike(growth_bonus=-0.05), config(equal_flops=False))
    assert "is not told: its runs" in judge(comparison).reasons[1]
    console = Console(width=200)
    with console.capture() as captured:
        print_comparison(console, comparison)
    table = {line.split()[0]: line for line in captured.get().splitlines() if line}
    assert table["grown"].count("not told") == 2
    assert "not told" not in table["static"]
    assert comparison_report(comparison, name="it").count("not told") == 3


def test_growth_that_loses_is_said_to_lose() -> None:
    verdict = judge(played(World(growth_bonus=-0.05), config()))
    assert verdict.outcome is Outcome.DOES_NOT_PAY
    assert "does not reach" in verdict.reasons[1]


@pytest.mark.parametrize(
    ("bonus", "outcome"),
    [(0.002, Outcome.PAYS_PER_STEP), (0.0, Outcome.UNDECIDED), (-0.002, Outcome.DOES_NOT_PAY)],
)
def test_where_size_buys_nothing_the_host_is_the_rival(bonus: float, outcome: Outcome) -> None:
    """Compute is better spent on more steps of the host, and in as many it is hardly worse."""

    class Flat(World):
        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            loss = 1.0 + 0.1 * request.random_seed
            loss += 0.05 * abs(math.log2(request.learning_rate / BEST_RATE))
            loss -= 0.05 * math.log2(request.epochs / EPOCHS)
            loss -= bonus if request.arm == "grown" else 0.0
            return result.model_copy(update={"test": {**result.test, "loss": loss}})

    comparison = played(Flat(), config())
    equal = at_equal_flops(comparison)
    assert equal is not None
    assert equal.rival == "host"
    assert equal.any_steps.above_zero
    assert judge(comparison).outcome is outcome


@dataclass(frozen=True)
class Null(World):
    """Loss is a law of the cost of a step and the number of steps, grown or not."""

    draw: int = 0

    def make(self, request: RunRequest) -> RunResult:
        result = super().make(request)
        step = result.flops / (request.epochs * 1e6)
        loss = 1.0 + 0.1 * request.random_seed - 0.02 * math.log2(step)
        loss -= 0.04 * math.log2(request.epochs / EPOCHS)
        loss += random.Random(f"{request.key} {self.draw}").gauss(0.0, 0.003)
        return result.model_copy(update={"test": {**result.test, "loss": loss}})


def test_where_growth_gains_nothing_it_is_said_to_pay_in_one_of_twenty_at_most() -> None:
    settings = config(search_rates=1, random_times=False)
    worlds = [Null(num_seeds=lambda _: 2, draw=draw) for draw in range(40)]
    outcomes = [judge(played(world, settings)).outcome for world in worlds]
    assert sum(outcome in (Outcome.PAYS, Outcome.PAYS_PER_STEP) for outcome in outcomes) <= 2


class Convex(World):
    """Loss falls less and less with the cost of a step, and growth gains nothing."""

    def make(self, request: RunRequest) -> RunResult:
        result = super().make(request)
        step = result.flops / (request.epochs * 1e6)
        loss = 1.0 + 0.1 * request.random_seed + 0.2 / step**1.5
        loss -= 0.05 * math.log2(request.epochs / EPOCHS)
        loss += random.Random(request.key).gauss(0.0, 0.001)
        return result.model_copy(update={"test": {**result.test, "loss": loss}})


@pytest.mark.parametrize(
    ("settings", "num_seeds", "words"),
    [
        ({"intermediate_sizes": False}, 3, "sizes in between were left out"),
        ({}, 1, "there is no size in between"),
    ],
)
def test_the_line_from_the_host_to_the_grown_size_is_no_size_in_between(
    settings: dict[str, object], num_seeds: int, words: str
) -> None:
    comparison = played(Convex(num_seeds=lambda _: num_seeds), config(**settings))
    assert at_equal_flops(comparison).same_steps is None
    verdict = judge(comparison)
    assert verdict.outcome not in (Outcome.PAYS, Outcome.PAYS_PER_STEP)
    assert any(words in reason for reason in verdict.reasons)


def test_a_size_in_between_is_said_to_be_interpolated() -> None:
    verdict = judge(played(World(), config()))
    assert any("interpolated between the next smaller and" in r for r in verdict.reasons)


@pytest.mark.parametrize("arm", ["host", "static 1", "static"])
def test_nothing_is_claimed_for_growth_while_a_better_rate_may_lie_beyond_those_tried(
    arm: str,
) -> None:
    class Edge(World):
        """The arm is best at the highest rate tried, by validation loss, and as ever by test."""

        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            if request.arm != arm:
                return result
            missed = 0.05 * abs(math.log2(request.learning_rate / BEST_RATE))
            return result.model_copy(
                update={
                    "validation": {**result.validation, "loss": -request.learning_rate},
                    "test": {**result.test, "loss": result.test["loss"] - missed},
                }
            )

    assert judge(played(World(growth_bonus=0.02), config())).outcome is Outcome.PAYS
    verdict = judge(played(Edge(growth_bonus=0.02), config()))
    assert verdict.outcome is Outcome.UNDECIDED
    assert verdict.reasons[0].startswith(f"the best learning rate of {arm} is the only one")
    assert "--rates" in verdict.reasons[0]


def test_growth_that_is_dearer_and_far_better_is_not_said_to_lose() -> None:
    """Measured at 1.3 of the static network's operations alone, where it is better."""

    class Dearer(World):
        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            factor = 1.3 / 0.8 if request.policy != "none" else 1.0
            return result.model_copy(update={"flops": factor * result.flops})

    comparison = played(Dearer(growth_bonus=0.3), config(equal_flops=False))
    assert judge(comparison).outcome is Outcome.UNDECIDED


def test_it_is_told_that_random_times_are_not_charged_with_evaluations() -> None:
    def told(policy: str) -> str:
        run = config().run.model_copy(update={"policy": policy})
        comparison = played(World(), config().model_copy(update={"run": run}))
        return judge(comparison).reasons[-1]

    assert "evaluations are not counted at random times" in told("heuristic")
    assert "evaluations" not in told("schedule"), "neither is charged with any"


def test_noise_is_not_decided_upon() -> None:
    verdict = judge(played(World(growth_bonus=-0.015, noise=0.02), config()))
    assert verdict.outcome is Outcome.UNDECIDED


@pytest.mark.parametrize("num_committed", [0, 2])
def test_few_seeds_are_no_claim(num_committed: int) -> None:
    world = World(growth_bonus=0.05, num_seeds=lambda _: num_committed)
    verdict = judge(played(world, config(seeds=3)))
    assert verdict.outcome is Outcome.UNDECIDED
    assert "too few" in verdict.reasons[0]


def test_a_network_of_the_grown_size_stays_the_same_run_however_its_seeds_were_measured() -> None:
    """So that what was trained without growing is taken again where weighing has changed."""

    class Measured(World):
        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            if request.policy == "none":
                return result
            seeds = tuple(
                one.model_copy(
                    update={"seed": one.seed.model_copy(update={"contribution_fraction": 0.7})}
                )
                for one in result.committed
            )
            return result.model_copy(update={"committed": seeds})

    fixed, measured = (played(world, config()).results for world in (World(), Measured()))
    assert fixed.keys() == measured.keys()


def test_nothing_committed_does_not_pay() -> None:
    comparison = played(World(num_seeds=lambda _: 0), config())
    assert comparison.arms == ["host", "grown"]
    assert judge(comparison).outcome is Outcome.DOES_NOT_PAY


def test_networks_that_grew_differently_are_compared_with_their_own_size() -> None:
    sizes = {0: 1, 1: 3, 2: 0, 3: 2, 4: 3}
    comparison = played(World(num_seeds=sizes.__getitem__), config())
    static = comparison.at_equal_steps("static")
    assert {seed: len(run.request.topology) for seed, run in static.items()} == sizes
    assert comparison.at_equal_steps("static 1").keys() == {1, 3, 4}
    assert comparison.at_equal_steps("static 2").keys() == {1, 4}
    labels = [summary.label(5) for summary in summarise(comparison)]
    assert "static 2 (2 of 5 seeds)" in labels
    assert "static" in labels


def test_a_better_rate_than_the_configured_one_is_used() -> None:
    settings = config(search_rates=4)
    run = settings.run.model_copy(update={"learning_rate": 4 * BEST_RATE})
    comparison = played(World(), settings.model_copy(update={"run": run}))
    assert comparison.chosen_rate("host") == pytest.approx(BEST_RATE)
    (host,) = (s for s in summarise(comparison) if s.arm == "host")
    assert host.rate_at_edge


FILE = "learned.safetensors"


@pytest.mark.parametrize(
    ("policies", "arms"),
    [
        (("/a/learned.safetensors",), ["policy learned.safetensors"]),
        (
            ("/a/learned.safetensors", "/b/learned.safetensors", "/b/[other] é.safetensors"),
            [
                "policy a/learned.safetensors",
                "policy b/learned.safetensors",
                "policy [other] é.safetensors",
            ],
        ),
        (("random", "/a/random.safetensors"), ["policy random", "policy a/random.safetensors"]),
        ((f"/a/{'long' * 60}.safetensors",), [f"policy {'long' * 60}.safetensors"]),
    ],
)
def test_a_policys_file_is_told_by_its_name_or_as_much_as_tells_it_from_others(
    policies: tuple[str, ...], arms: list[str]
) -> None:
    comparison = played(World(), config(policies=policies))
    assert comparison.arms[-len(arms) :] == arms
    decided = {run.request.arm: run.request.policy for run in comparison.results.values()}
    assert [decided[arm] for arm in arms] == list(policies)
    assert all(re.fullmatch(r"[\w.-]{1,100}", key, re.ASCII) for key in comparison.results)


def test_a_policys_file_is_shown_by_its_name_whatever_is_in_it() -> None:
    settings = config(policies=("/a/policy [bold].safetensors",))
    comparison = played(World(), settings)
    last = comparison.at_equal_steps("policy policy [bold].safetensors")[0]
    outlook = Outlook(finished=9, expected=9, running=(last.request,), seconds_left=0.0)
    console = Console(width=200)
    with console.capture() as captured:
        LiveCompareView(console, settings).change(outlook, last)
        print_comparison(console, comparison)
    lines = [line for line in captured.get().splitlines() if line.startswith("policy policy ")]
    assert len(lines) == 2, "as it ends, and in the table"
    assert all(line.startswith("policy policy [bold].safetensors") for line in lines)


def test_runs_that_are_kept_keep_their_names() -> None:
    request = RunRequest(arm="static 1", random_seed=0, learning_rate=0.01, epochs=9)
    assert request.key == "static-1-seed0-1b55a956f0ad"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"random_seeds": (1,)}, "at least two"),
        ({"random_seeds": (1, 1)}, "different numbers"),
        ({"search_seeds": 6}, "5 random seeds"),
        ({"search_rates": 2}, "at least 3"),
        ({"policies": ("heuristic",)}, "compared anyway"),
        ({"policies": (FILE, str(Path(FILE).absolute()))}, "policies must differ"),
    ],
)
def test_settings_that_make_no_comparison_are_refused(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        CompareConfig(**{"run": config().run, "random_seeds": (0, 1, 2, 3, 4), **settings})


def test_runs_that_cost_the_same_count_as_one() -> None:
    """As of sizes whose seeds cost no operations: neither is the better one for being first."""
    made = [
        World().make(RunRequest(arm=arm, random_seed=0, learning_rate=BEST_RATE, epochs=EPOCHS))
        for arm in ("host", "static 1", "static")
    ]
    runs = [
        run.model_copy(update={"flops": flops, "test": {"loss": loss}})
        for run, flops, loss in zip(made, (1.0, 1.0, 4.0), (0.7, 0.9, 0.4), strict=True)
    ]
    assert curve_of(runs, lambda run: run.flops) == [(1.0, pytest.approx(0.8)), (4.0, 0.4)]


# Runs that diverge


class Diverging(World):
    """One arm's first random seed ends after a few steps, without a finite loss."""

    arm = ""

    def make(self, request: RunRequest) -> RunResult:
        result = super().make(request)
        searched = request.learning_rate != BEST_RATE
        if request.arm != self.arm or request.random_seed != 1 or searched:
            return result
        lost = {"test": {"loss": math.inf, "accuracy": math.nan}, "flops": 1e-3 * result.flops}
        return result.model_copy(update=lost)


@pytest.mark.parametrize("arm", ["host", "static 1", "static", "grown"])
def test_a_run_that_diverged_decides_nothing(arm: str) -> None:
    world = type("World", (Diverging,), {"arm": arm})(growth_bonus=0.1)
    comparison = played(world, config())
    verdict = judge(comparison)
    assert verdict.outcome is Outcome.UNDECIDED
    assert verdict.reasons[0].startswith(f"{arm} diverged on random seed 1")
    json.dumps(summary_record(comparison), allow_nan=False)
    assert len(comparison.results) <= len(played(World(growth_bonus=0.1), config()).results)
    assert max(result.request.epochs for result in comparison.results.values()) < 10 * EPOCHS


def test_growth_that_diverged_on_one_seed_and_committed_nothing_decides_nothing() -> None:
    world = type("World", (Diverging,), {"arm": "grown"})(num_seeds=lambda _: 0)
    verdict = judge(played(world, config()))
    assert verdict.outcome is Outcome.UNDECIDED
    assert verdict.reasons[0].startswith("grown diverged on random seed 1")


def test_nothing_is_made_up_where_nothing_is_finished() -> None:
    record = summary_record(Comparison(config(), []))
    assert (record["outcome"], record["arms"]) == ("not decided", [])
    assert not any(record["equal_flops"].values())


# The picture


def test_a_mean_curve_joins_budgets_that_are_alike_relative_to_equal_steps() -> None:
    """Growth is dear on the first random seed, and cut short there, cheap on others."""

    class Uneven(World):
        def make(self, request: RunRequest) -> RunResult:
            result = super().make(request)
            factor = 1.5 if request.policy != "none" and request.random_seed == 0 else 1.0
            return result.model_copy(update={"flops": factor * result.flops})

    comparison = played(Uneven(), config(seeds=3))
    lengths = [[run.request.epochs for run in runs] for runs in comparison.runs("grown").values()]
    assert lengths == [[83, 100], [100, 125], [100, 125]]
    (grown,) = (s for s in summarise(comparison) if s.arm == "grown")
    assert [cost for cost, _ in grown.curve] == [grown.flops]


def test_an_arm_that_diverged_is_left_out_of_the_pictures() -> None:
    world = type("World", (Diverging,), {"arm": "random times"})()
    comparison = played(world, config())
    for chart in comparison_charts(comparison):
        json.dumps(chart.as_json(), allow_nan=False)
        drawn = [trace["name"] for trace in chart.figure["data"]]
        assert "grown" in drawn
        assert "random times" not in drawn
    assert "random times" in comparison_report(comparison, name="it")  # the table tells


@pytest.mark.browser
def test_the_table_of_arms_is_seen_whole_on_a_desk(tmp_path: Path) -> None:
    page_file = tmp_path / "report.html"
    page_file.write_text(comparison_report(played(World(), config()), name="it"), encoding="utf-8")
    with launched() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(page_file.as_uri())
        table = page.locator(".table").first
        assert "±" in table.locator("td small").first.inner_text()
        assert table.evaluate("node => node.scrollWidth <= node.clientWidth")


def test_without_a_finished_arm_there_is_nothing_to_draw() -> None:
    comparison = Comparison(config(), [])
    assert comparison_charts(comparison) == []
    assert "not decided" in comparison_report(comparison, name="it")
