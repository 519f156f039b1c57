"""Weighing seeds on held-out data: which amplitude, which contribution."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.lifecycle.events import AmplitudeSearched, ContributionMeasured, Event
from esper.lifecycle.stages import SeedStage
from esper.slots.counterfactual import Imitated, Variant, fitting_imitations, weigh
from esper.slots.modes import device_of, evaluation_mode, forked_random_state
from esper.slots.slot import SeedSlot
from esper.training.held_out import Evaluate, VariantEvaluator, metrics_of

AMPLITUDES = (0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
"""What the line search tries; 0, the host alone, is always among them. Wide, since an objective
knows the direction better than the size: benchmarks/seed_objective.py."""

_WEIGHABLE = frozenset({SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY})


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How much lower a loss is than a reference, over the same samples."""

    fraction: float
    """Mean saving over the size of the reference's mean, which may be negative."""
    standard_error_fraction: float | None
    """Of that mean; None where losses per sample are not known."""

    def lower_fraction(self, standard_errors: float) -> float:
        """So many standard errors below the mean; the mean where the error is not known."""
        return self.fraction - standard_errors * (self.standard_error_fraction or 0.0)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Held-out losses of one variant."""

    mean: float
    per_sample: Tensor | None

    def saving_over(self, reference: "Losses") -> Saving:
        """Return how much lower these losses are than the reference's."""
        scale = abs(reference.mean) if reference.mean != 0.0 else math.nan
        error = None
        if self.per_sample is not None and reference.per_sample is not None:
            differences = reference.per_sample - self.per_sample
            if differences.numel() > 1:
                spread = float(differences.std())
                error = spread / math.sqrt(differences.numel()) / scale
        saving = (reference.mean - self.mean) / scale
        return Saving(fraction=saving, standard_error_fraction=error)


def losses_of(
    model: nn.Module,
    slots: Mapping[str, SeedSlot],
    evaluate: Evaluate,
    variants: Sequence[Variant],
) -> list[Losses]:
    """Return the held-out losses of each variant, fused where the evaluation can.

    Each evaluation draws the same from the global random streams, which stay where they are:
    variants whose data differ could not be compared.
    """
    if isinstance(evaluate, VariantEvaluator):
        with forked_random_state(device_of(model)):
            samples = evaluate.variant_losses(slots, variants)
        means = [float(losses.mean()) for losses in samples]
        return [
            Losses(mean=mean, per_sample=losses)
            for mean, losses in zip(means, samples, strict=True)
        ]
    results = []
    for variant in variants:
        with ExitStack() as stack:
            stack.enter_context(forked_random_state(device_of(model)))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(torch.no_grad())  # an evaluation may differentiate inside
            for path, choice in variant.items():
                stack.enter_context(weigh(slots[path], choice))
            loss = metrics_of(evaluate())["loss"]
        results.append(Losses(mean=loss, per_sample=None))
    return results


def probe_seeds(
    model: nn.Module, slots: Mapping[str, SeedSlot], evaluate: Evaluate, *, host_learns: bool
) -> list[Event]:
    """Measure every living seed that can be measured, and write it into its slot's measurements.

    A TRAINING seed that has trained long enough gets an amplitude line search. A seed at alpha 1
    gets its contribution, the loss without it against the loss with it; and the same against the
    loss with the best linear map of the features in its place, where its gates ask for that. The
    layers around a slot are linear maps of the same features, so what such a map does, a rescaling
    say, is nothing that a host lacks.

    Args:
        model: The host with its slots.
        slots: By path.
        evaluate: As `Growth.after_epoch`.
        host_learns: Whether any of the host's own parameters does. A frozen host cannot take over
            what a linear map does: its seeds are weighed against the host without them only.
    """
    trained = [path for path, slot in slots.items() if _searchable(slot)]
    weighable = [path for path, slot in slots.items() if _at_full_alpha(slot)]
    if not trained and not weighable:
        return []
    present: dict[str, float] = dict.fromkeys(trained, 0.0) | dict.fromkeys(weighable, 1.0)
    imitable = {path: slots[path] for path in weighable} if host_learns else {}
    with fitting_imitations(imitable) as fits:
        (base,) = losses_of(model, slots, evaluate, [present])
    imitations = {path: fit.solve() for path, fit in fits.items()}
    choices: dict[str, list[float | Imitated]] = {path: list(AMPLITUDES) for path in trained}
    for path in weighable:
        imitation = imitations.get(path) if _asks_over_linear(slots[path]) else None
        choices[path] = [0.0] if imitation is None else [0.0, Imitated(1.0, imitation)]
    variants: list[Variant] = [
        {**present, path: choice} for path, tried in choices.items() for choice in tried
    ]
    rest = iter(losses_of(model, slots, evaluate, variants))
    measured = {path: [next(rest) for _ in tried] for path, tried in choices.items()}
    for path in trained:
        slots[path].measurements.best_amplitude = _best_amplitude(measured[path])
    rescaled = _losses_rescaled(model, slots, evaluate, present, trained)
    events = [
        _note_amplitudes(slots[path], base, measured[path], rescaled=rescaled[path])
        for path in trained
    ]
    for path in weighable:
        without, *linear = measured[path]
        imitation = imitations.get(path)
        share = None if imitation is None else imitation.share
        if not host_learns:
            linear, share = [without], 0.0
        slots[path].measurements.linear_share = share
        events.append(_note_contribution(slots[path], base, without, *linear))
    return events


def _searchable(slot: SeedSlot) -> bool:
    enough = slot.config.thresholds.min_training_steps
    return slot.stage is SeedStage.TRAINING and slot.measurements.training_steps >= enough


def _at_full_alpha(slot: SeedSlot) -> bool:
    return slot.stage in _WEIGHABLE and slot.alpha == 1.0 and not slot.fading


def _asks_over_linear(slot: SeedSlot) -> bool:
    return slot.config.thresholds.min_over_linear_fraction is not None


def _note_contribution(
    slot: SeedSlot, with_seed: Losses, without: Losses, linear: Losses | None = None
) -> Event:
    errors = slot.config.thresholds.standard_errors
    saving = with_seed.saving_over(without)
    over_linear = None if linear is None else with_seed.saving_over(linear)
    measured = slot.measurements
    measured.contribution_fraction = saving.lower_fraction(errors)
    measured.over_linear_fraction = (
        math.nan if over_linear is None else over_linear.lower_fraction(errors)
    )
    if slot.stage is SeedStage.PROBATIONARY:
        measured.trial_contributions.append(measured.contribution_fraction)
        measured.trial_over_linear.append(measured.over_linear_fraction)
    return ContributionMeasured(
        slot=slot.path,
        stage=slot.stage,
        loss_with=with_seed.mean,
        loss_without=without.mean,
        contribution_fraction=saving.fraction,
        standard_error_fraction=saving.standard_error_fraction,
        linear_loss=None if linear is None else linear.mean,
        linear_share=measured.linear_share,
        over_linear_fraction=None if over_linear is None else over_linear.fraction,
        over_linear_standard_error_fraction=(
            None if over_linear is None else over_linear.standard_error_fraction
        ),
    )


def _best_amplitude(tried: Sequence[Losses]) -> float:
    finite = [index for index, losses in enumerate(tried) if math.isfinite(losses.mean)]
    return AMPLITUDES[min(finite, key=lambda index: tried[index].mean, default=0)]


def _losses_rescaled(
    model: nn.Module,
    slots: Mapping[str, SeedSlot],
    evaluate: Evaluate,
    present: Mapping[str, float],
    paths: Sequence[str],
) -> dict[str, Losses]:
    """Return the losses that each seed would begin to blend with, at alpha 1 and rescaled."""
    if not paths:
        return {}
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(slots[path].rescaled())
        losses = losses_of(model, slots, evaluate, [{**present, path: 1.0} for path in paths])
    return dict(zip(paths, losses, strict=True))


def _note_amplitudes(
    slot: SeedSlot, host: Losses, tried: Sequence[Losses], *, rescaled: Losses
) -> Event:
    saving = rescaled.saving_over(host)
    measured = slot.measurements
    assert measured.best_amplitude is not None
    measured.line_search_gain_fraction = saving.lower_fraction(
        slot.config.thresholds.standard_errors
    )
    return AmplitudeSearched(
        slot=slot.path,
        amplitudes=AMPLITUDES,
        losses=tuple(losses.mean for losses in tried),
        host_loss=host.mean,
        best_amplitude=measured.best_amplitude,
        rescaled_loss=rescaled.mean,
        gain_fraction=measured.line_search_gain_fraction,
    )
