"""A seed is weighed against the host without it, and against a linear map in its place."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.lifecycle.events import AmplitudeSearched, ContributionMeasured
from esper.lifecycle.stages import SeedStage
from esper.slots import SeedSlot
from esper.training.held_out import Evaluate
from esper.training.probing import Losses, probe_seeds
from growth_problem import Problem, make_problem
from planted_seeds import planted


@pytest.fixture(autouse=True)
def _planted() -> Iterator[None]:
    with planted():
        yield


def grown(blueprint: str, stage: SeedStage) -> tuple[Problem, SeedSlot]:
    """A seed with random weights, as if it had learned something."""
    problem = make_problem()
    slot = problem.slots["embed"]
    fill(slot, blueprint, stage)
    return problem, slot


def fill(slot: SeedSlot, blueprint: str, stage: SeedStage) -> None:
    slot.germinate(blueprint)
    while slot.stage is not stage:
        slot.advance(force=True)
    torch.manual_seed(1)
    assert slot.living is not None
    with torch.no_grad():
        for parameter in slot.living.parameters():
            parameter.normal_(std=0.3)
    slot.measurements.training_steps = slot.config.thresholds.min_training_steps


def weighed(problem: Problem, evaluate: Evaluate | None = None, *, host_learns: bool = True):
    evaluate = evaluate or problem.held_out
    (event,) = probe_seeds(problem.model, problem.slots, evaluate, host_learns=host_learns)
    return event


def plain(problem: Problem) -> Evaluate:
    """The same held-out loss from a function that knows of no variants."""
    return lambda: problem.held_out()["loss"]


def test_an_evaluation_may_differentiate() -> None:
    """As one of forces does, or of adversarial examples."""
    problem, _ = grown("lora", SeedStage.SHADOWING)

    def slope() -> float:
        with torch.enable_grad():
            features = problem.batches[0][0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(problem.model(features).sum(), features)
        return float(gradient.square().mean())

    event = weighed(problem, slope)
    assert event.loss_with != event.loss_without


def test_a_seed_that_rescales_saves_nothing_over_a_linear_map_whatever_it_contributes() -> None:
    for blueprint in ("rescale", "gain_and_shift", "lora"):
        problem, slot = grown(blueprint, SeedStage.SHADOWING)
        event = weighed(problem)
        assert isinstance(event, ContributionMeasured)
        assert abs(event.contribution_fraction) > 0.01
        assert event.over_linear_fraction == pytest.approx(0.0, abs=1e-4)
        assert event.linear_loss == pytest.approx(event.loss_with, rel=1e-4)
        assert slot.measurements.over_linear_fraction == pytest.approx(0.0, abs=1e-4)
        assert event.linear_share == slot.measurements.linear_share == pytest.approx(1.0, abs=1e-4)


def test_a_seed_that_adds_nothing_is_all_linear() -> None:
    problem, slot = grown("noop", SeedStage.SHADOWING)
    weighed(problem)
    assert slot.measurements.linear_share == 1.0
    assert slot.measurements.contribution_fraction == 0.0


def test_a_seed_that_is_not_linear_is_weighed_against_the_map_nearest_to_it() -> None:
    problem, _ = grown("mlp", SeedStage.SHADOWING)
    event = weighed(problem)
    assert event.linear_loss is not None
    assert event.linear_loss != pytest.approx(event.loss_with, rel=1e-2)
    assert event.linear_loss != pytest.approx(event.loss_without, rel=1e-2)


def test_a_frozen_host_takes_nothing_over_so_the_host_alone_is_what_counts() -> None:
    problem, slot = grown("gain_and_shift", SeedStage.SHADOWING)
    event = weighed(problem, host_learns=False)
    measured = slot.measurements
    assert measured.over_linear_fraction == measured.contribution_fraction
    assert measured.linear_share == 0.0
    assert event.linear_loss == event.loss_without


@pytest.mark.parametrize("blueprint", ["mlp", "gain_and_shift"])
def test_a_plain_evaluation_weighs_the_same(blueprint: str) -> None:
    problem, _ = grown(blueprint, SeedStage.SHADOWING)
    fused, alone = weighed(problem), weighed(problem, plain(problem))
    assert alone.linear_loss == pytest.approx(fused.linear_loss, rel=1e-4)
    assert alone.linear_share == pytest.approx(fused.linear_share, rel=1e-4)
    assert alone.over_linear_fraction == pytest.approx(fused.over_linear_fraction, abs=1e-4)
    assert fused.over_linear_standard_error_fraction is not None
    assert alone.over_linear_standard_error_fraction is None


@pytest.mark.parametrize("first_committed", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_growth_asks_whether_the_host_learns(*, freeze: bool, first_committed: bool) -> None:
    """What was committed is the host's now, and no reason to take it for one that learns."""
    problem = make_problem()
    growth = esper.Growth(
        problem.slots,
        problem.optimizer,
        policy=esper.PlannedPolicy({}, tend_seeds=False),
        sinks=[problem.recorder],
    )
    slot = problem.slots["embed"]
    if first_committed:
        slot.germinate("mlp")
        while slot.stage is not SeedStage.FOSSILIZED:
            slot.advance(force=True)
    fill(slot, "gain_and_shift", SeedStage.SHADOWING)
    problem.model.embed.requires_grad_(requires_grad=not freeze)
    problem.model.head.requires_grad_(requires_grad=not freeze)
    growth.after_epoch(problem.held_out)
    (event,) = problem.recorder.of(ContributionMeasured)
    expected = event.loss_without if freeze else event.loss_with
    assert event.linear_loss == pytest.approx(expected, rel=1e-4)


def test_a_seed_that_is_not_finite_is_imitated_by_nothing_and_passes_nothing() -> None:
    problem, slot = grown("mlp", SeedStage.SHADOWING)
    assert slot.living is not None
    with torch.no_grad():
        next(slot.living.parameters()).fill_(math.nan)
    event = weighed(problem)
    assert event.linear_loss is None
    assert math.isnan(slot.measurements.over_linear_fraction or 0.0)
    assert slot.measurements.linear_share is None


def test_a_linear_map_that_no_gate_asks_about_costs_no_evaluation() -> None:
    problem, slot = grown("mlp", SeedStage.SHADOWING)
    for asked, least in ((3, 0.02), (2, None)):
        thresholds = slot.config.thresholds.model_copy(update={"min_over_linear_fraction": least})
        slot.config = slot.config.model_copy(update={"thresholds": thresholds})
        evaluations = 0

        def evaluate() -> float:
            nonlocal evaluations
            evaluations += 1
            return problem.held_out()["loss"]

        event = weighed(problem, evaluate)
        assert evaluations == asked
        assert (event.linear_loss is None) == (least is None)
        assert event.linear_share is not None


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.SHADOWING])
@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_savings_are_of_the_same_samples_in_whatever_order_they_come(
    generator: torch.Generator | None, stage: SeedStage
) -> None:
    """Else the standard error would be that of the differences between two samples' losses."""
    problem, slot = grown("mlp", stage)
    data = TensorDataset(*problem.held_out.batches[0])
    judged = []
    for loader in (DataLoader(data, 32), DataLoader(data, 32, shuffle=True, generator=generator)):
        weighed(problem, esper.HeldOut(problem.model, loader, loss=problem.held_out.loss))
        measured = slot.measurements
        judged.append(
            [measured.line_search_gain_fraction]
            if stage is SeedStage.TRAINING
            else [measured.contribution_fraction, measured.over_linear_fraction]
        )
    in_order, shuffled = judged
    assert shuffled == pytest.approx(in_order, rel=1e-4)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.SHADOWING])
def test_an_evaluation_that_draws_samples_weighs_all_on_the_same_ones(stage: SeedStage) -> None:
    problem, _ = grown("noop", stage)
    ((inputs, targets),) = problem.held_out.batches

    def evaluate() -> float:
        drawn = torch.randperm(len(inputs))[:20]
        return float(mse_loss(problem.model(inputs[drawn]), targets[drawn]))

    event = weighed(problem, evaluate)
    if isinstance(event, AmplitudeSearched):
        losses = {*event.losses, event.host_loss, event.rescaled_loss}
    else:
        losses = {event.loss_with, event.loss_without, event.linear_loss}
    assert len(losses) == 1


@pytest.mark.parametrize("most", [1, 2, 8])
def test_variants_run_in_no_more_copies_at_a_time_than_there_is_room_for(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, slot = grown("mlp", SeedStage.SHADOWING)
    ((inputs, _),) = problem.held_out.batches
    sizes = []
    problem.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    variants = [{"embed": alpha} for alpha in (0.0, 0.5, 1.0)]
    together = problem.held_out.variant_losses({"embed": slot}, variants)
    sizes.clear()
    monkeypatch.setattr(problem.held_out, "max_copies", most)
    apart = problem.held_out.variant_losses({"embed": slot}, variants)
    assert max(sizes) == min(most, 3) * len(inputs)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_the_standard_error_is_that_of_the_mean_over_samples() -> None:
    problem, slot = grown("mlp", SeedStage.SHADOWING)
    event = weighed(problem)
    on, off = problem.held_out.variant_losses(
        {"embed": slot}, [{"embed": alpha} for alpha in (1.0, 0.0)]
    )
    expected = (off - on).std() / math.sqrt(len(on)) / off.mean()
    assert event.standard_error_fraction == pytest.approx(float(expected), rel=1e-4)


def test_of_a_negative_loss_less_is_a_saving_too() -> None:
    """As a likelihood's may be; what is saved is relative to its size."""
    worse, better = (
        Losses(mean=mean, per_sample=torch.tensor([mean - 0.1, mean + 0.1]))
        for mean in (-1.0, -1.2)
    )
    saving = better.saving_over(worse)
    assert saving.fraction == pytest.approx(0.2)
    assert saving.standard_error_fraction == pytest.approx(0.0, abs=1e-6)
    assert worse.saving_over(better).fraction == pytest.approx(-0.2 / 1.2)
    uneven = Losses(mean=-1.2, per_sample=torch.tensor([-1.5, -0.9]))
    assert uneven.saving_over(worse).lower_fraction(1.0) < uneven.saving_over(worse).fraction


def test_more_standard_errors_judge_a_saving_lower() -> None:
    judged = []
    for errors in (0.0, 1.0, 2.0):
        problem, slot = grown("mlp", SeedStage.SHADOWING)
        thresholds = slot.config.thresholds.model_copy(update={"standard_errors": errors})
        slot.config = slot.config.model_copy(update={"thresholds": thresholds})
        event = weighed(problem)
        measured = slot.measurements
        for lower, mean, error in (
            (
                measured.contribution_fraction,
                event.contribution_fraction,
                event.standard_error_fraction,
            ),
            (
                measured.over_linear_fraction,
                event.over_linear_fraction,
                event.over_linear_standard_error_fraction,
            ),
        ):
            assert lower == pytest.approx(mean - errors * error)
        judged.append(measured.contribution_fraction)
    assert judged == sorted(judged, reverse=True)


@pytest.mark.parametrize("blueprint", ["mlp", "gain_and_shift"])
def test_a_compiled_host_is_weighed_the_same(blueprint: str) -> None:
    problem, _ = grown(blueprint, SeedStage.SHADOWING)
    eager = weighed(problem)
    torch.compiler.reset()
    compiled = torch.compile(problem.model, backend="eager", fullgraph=True)
    batches = [(x, y) for x, y in problem.held_out.batches for _ in range(3)]
    held_out = esper.HeldOut(compiled, batches, loss=problem.held_out.loss)
    event = weighed(problem, held_out)
    assert event.linear_loss == pytest.approx(eager.linear_loss, rel=1e-4)
    assert event.linear_share == pytest.approx(eager.linear_share, rel=1e-4)
    assert event.loss_without == pytest.approx(eager.loss_without, rel=1e-4)
